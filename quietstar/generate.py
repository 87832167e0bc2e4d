"""`python -m quietstar.generate`: continue texts with a model that thinks before each token."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from quietstar.config.command_line import run_command
from quietstar.config.values import DTYPES, check_device
from quietstar.errors import ConfigError
from quietstar.inference.prompts import CompletionOptions, read_prompts
from quietstar.model.think_rule import FORMS
from quietstar.runs.checkpoints import checkpoint_directory

if TYPE_CHECKING:
    from quietstar.inference.completing import CompletedPrompt


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: generate(arguments))


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    default = CompletionOptions()
    p = argparse.ArgumentParser(
        prog="python -m quietstar.generate",
        description="Continues texts, with a thought before each new token. What was added goes to standard output, "
        "and how fast it was and at what share of the tokens it thought to standard error.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a thinking model: directory, training run or hub name")
    p.add_argument("--prompt", metavar="TEXT", action="append", help="a text to continue; may be given several times")
    p.add_argument("--prompts", metavar="FILE", help=".txt with a prompt a line, or .jsonl with a field prompt")
    p.add_argument("--max_new_tokens", type=int, default=default.max_new_tokens, help="default: %(default)s")
    p.add_argument("--think", metavar="WHERE", default=default.think, help=f"{FORMS}; default: %(default)s")
    p.add_argument("--thoughts_per_token", type=int, metavar="K", default=1, help="default: %(default)s")
    p.add_argument(
        "--thought_temperature", type=float, help="0: greedy; default: 0 for one thought, the model's for several"
    )
    p.add_argument("--temperature", type=float, default=0.0, help="of the text; 0 (default): the likeliest token")
    p.add_argument("--top_k", type=int, help="draw from the k likeliest tokens")
    p.add_argument("--top_p", type=float, help="draw from the likeliest tokens that have this probability together")
    p.add_argument("--seed", type=int, help="of what is drawn; by default another one each time, which is reported")
    p.add_argument("--samples", type=int, default=1, help="completions of each prompt; default: %(default)s")
    p.add_argument("--batch_size", type=int, default=default.batch_size, help="prompts at once; default: %(default)s")
    p.add_argument(
        "--stop", metavar="STRING", action="append", help="a completion ends where it has this; may be given repeatedly"
    )
    p.add_argument("--show_thoughts", action="store_true", help="each token with the thought before it and its weight")
    p.add_argument("--stream", action="store_true", help="show the text of the only prompt as it comes")
    p.add_argument("--json", action="store_true", help="a JSON line per completion")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as saved")
    p.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint has none beside it")
    return p


def generate(arguments: argparse.Namespace) -> None:
    """Completes the prompts and prints what was added, batch by batch.

    Raises:
        ConfigError: An option cannot be used, or there is no model that thinks.
        DataError: A prompt cannot be used.
        CheckpointError: The checkpoint is damaged.
    """
    chosen = {field.name: getattr(arguments, field.name) for field in fields(CompletionOptions)}
    chosen["seed"] = secrets.randbits(32) if arguments.seed is None else arguments.seed
    options = CompletionOptions(**{**chosen, "stop": tuple(arguments.stop or ())})
    check_device(arguments.device, "device")
    prompts = read_prompts(arguments.prompt, arguments.prompts)
    alone = len(prompts) * options.samples == 1
    if arguments.stream and (arguments.json or not alone):
        got = "--json" if arguments.json else f"{len(prompts) * options.samples} completions"
        raise ConfigError(f"stream: got it with {got}; needs one prompt, one sample and plain text")
    directory = checkpoint_directory(arguments.checkpoint)
    from transformers import TextStreamer  # after all that can be refused before torch comes

    from quietstar.inference.completing import complete
    from quietstar.inference.loading import load_thinking
    from quietstar.model.thinking_cache import ThinkingRecord

    model, tokenizer = load_thinking(
        directory, device=arguments.device, dtype=arguments.dtype, tokenizer=arguments.tokenizer
    )
    streamer = None
    if arguments.stream:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    record = ThinkingRecord()
    for number, completion in enumerate(complete(model, tokenizer, prompts, options, record, streamer)):
        if arguments.json:
            print(json.dumps(_as_json(completion, tokenizer, arguments.show_thoughts), ensure_ascii=False), flush=True)
            continue
        if not alone:
            sample = f", sample {number % options.samples + 1}" if options.samples > 1 else ""
            print(f"--- {completion.prompt.place}{sample}")
        if not arguments.stream:
            print(completion.text, end="" if completion.text.endswith("\n") else "\n", flush=True)
        if arguments.show_thoughts:
            print("\n".join(_table(completion, tokenizer)), flush=True)
    seed = f"; seed {options.seed}" if options.draws else ""
    print(f"{record}{seed}", file=sys.stderr)


def _as_json(completion: CompletedPrompt, tokenizer: Any, with_thoughts: bool) -> dict[str, Any]:
    line = {"prompt": completion.prompt.text, "completion": completion.text, "tokens": completion.tokens}
    if with_thoughts:
        line["thoughts"] = [
            own and [{"text": tokenizer.decode(tokens), "weight": weight} for tokens, weight in own]
            for own in completion.thoughts
        ]
    return line


def _table(completion: CompletedPrompt, tokenizer: Any) -> list[str]:
    """A line for each thought: the token it came before, its mixing weight, its text."""
    lines = ["weight  token <- thought"]
    for token, thoughts in zip(completion.tokens, completion.thoughts, strict=True):
        shown = repr(tokenizer.decode([token]))
        for tokens, weight in thoughts or ():
            thought = repr(tokenizer.decode(tokens)) if tokens else "pause"
            lines.append(f"{weight:6.3f}  {shown} <- {thought}")
            shown = " " * len(shown)
        if not thoughts:
            lines.append(f"     -  {shown}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
