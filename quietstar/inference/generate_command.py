"""What `quietstar.generate` does: completions of prompts as text, as JSON, or with their thoughts."""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quietstar.config.checkpoint import CheckpointOptions
from quietstar.config.command_line import Command
from quietstar.errors import ConfigError
from quietstar.inference.prompts import CompletionOptions, read_prompts
from quietstar.runs.checkpoints import checkpoint_directory

if TYPE_CHECKING:
    from quietstar.inference.completing import CompletedPrompt


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CompletionOptions, CheckpointOptions):
    """Continues texts, with a thought before each new token.

    What was added goes to standard output, and how fast it was and at what share of the tokens it thought to standard
    error.

    Args:
        prompt: Text to continue; may be given several times.
        prompts: File of prompts: .txt with one a line, or .jsonl with a field prompt.
        seed: Seed of whatever is drawn; by default another one each time, which is reported.
        show_thoughts: Print each token with the thought before it and its weight.
        stream: Show the text of the only prompt as it comes.
        json: Print a JSON line for each completion.
    """

    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    show_thoughts: bool = False
    stream: bool = False
    json: bool = False


GENERATE = Command("generate", GenerateOptions, argument="checkpoint")


def generate(options: GenerateOptions) -> None:
    """Completes the prompts and prints what was added, batch by batch.

    Raises:
        ConfigError: An option cannot be used, or there is no model that thinks.
        DataError: A prompt cannot be used.
        CheckpointError: The checkpoint is damaged.
    """
    prompts = read_prompts(options.prompt, options.prompts)
    alone = len(prompts) * options.samples == 1
    if options.stream and (options.json or not alone):
        got = "--json" if options.json else f"{len(prompts) * options.samples} completions"
        raise ConfigError(f"stream: got it with {got}; needs one prompt, one sample and plain text")
    directory = checkpoint_directory(options.checkpoint)
    from transformers import TextStreamer  # after all that can be refused before torch comes

    from quietstar.inference.completing import complete
    from quietstar.inference.loading import load_thinking
    from quietstar.model.thinking_cache import ThinkingRecord

    model, tokenizer = load_thinking(directory, device=options.device, dtype=options.dtype, tokenizer=options.tokenizer)
    streamer = None
    if options.stream:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    record = ThinkingRecord()
    for number, completion in enumerate(complete(model, tokenizer, prompts, options, record, streamer)):
        if options.json:
            print(json.dumps(_as_json(completion, tokenizer, options.show_thoughts), ensure_ascii=False), flush=True)
            continue
        if not alone:
            sample = f", sample {number % options.samples + 1}" if options.samples > 1 else ""
            print(f"--- {completion.prompt.place}{sample}")
        if not options.stream:
            print(completion.text, end="" if completion.text.endswith("\n") else "\n", flush=True)
        if options.show_thoughts:
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
