"""The commands `generate`, `view` and `gate`: the options of each, then the function that does its work.

`generate` completes prompts as text, as JSON, or with thoughts. `view` writes the page of a text, and the report of
the run that the model comes from again. `gate` fits a thinking gate to a text, and writes the model with the gate.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tqdm import tqdm

from quietstar.config.command_line import Command, narrowed
from quietstar.config.options import (
    INPUT,
    INPUT_ONCE,
    CheckpointOptions,
    Count,
    Seed,
    SpecialTokensMean,
    Text,
    at_least,
    check_name,
    path_kind,
)
from quietstar.data.rows import BadRows
from quietstar.data.shards import find_shards
from quietstar.data.sources import STANDARD_INPUT, TEXT_OPTIONS, read_documents, read_text
from quietstar.errors import ConfigError
from quietstar.inference.gate_choices import FitOptions
from quietstar.inference.prompts import FIELD, CompletionOptions, read_prompts
from quietstar.reporting.comparison_report import write_any_report
from quietstar.reporting.viewer import ViewOptions
from quietstar.runs.checkpoints import checkpoint_directory
from quietstar.runs.directory import model_name, run_of, training_length
from quietstar.runs.files import THOUGHTS, make_output_dir, saving

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.data.packing import PackedTexts
    from quietstar.inference.completing import CompletedPrompt
    from quietstar.inference.gate_choices import GateReport
    from quietstar.model.modeling import QuietStarForCausalLM


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CompletionOptions, CheckpointOptions):
    """Continues texts, with a thought before each new token.

    The new text goes to standard output; the speed and the share of tokens with a thought go to standard error.

    Args:
        prompt: Text to continue; may be given several times.
        prompts: File of prompts: a text with one prompt per line, or a file with one in each row, of the kinds that
            training reads; `-` is standard input.
        field: Field of a row that holds the prompt, or a chat, which the model answers.
        seed: Seed of the sampled tokens and thoughts. By default a new one each time, which is printed.
        show_thoughts: Whether each new token is printed with the thought before it and the mixing weight.
        stream: Whether the text is shown while it is generated; for a single prompt.
        json: Whether a JSON line is printed for each completion.
    """

    prompt: tuple[str, ...] = ()
    prompts: Annotated[str | None, INPUT_ONCE] = None
    field: Text = FIELD
    seed: Seed = dataclasses.field(default_factory=lambda: secrets.randbits(32))
    show_thoughts: bool = False
    stream: bool = False
    json: bool = False


GENERATE = Command("generate", GenerateOptions, argument="checkpoint")


def generate(options: GenerateOptions) -> None:
    """Completes the prompts and prints the new text, batch by batch.

    Raises:
        ConfigError: An option cannot be used, or the model does not exist or cannot think.
        DataError: A prompt cannot be used.
        CheckpointError: The checkpoint is damaged.
    """
    prompts = read_prompts(options.prompt, options.prompts, options.field)
    alone = len(prompts) * options.samples == 1
    if options.stream and (options.json or not alone):
        got = "--json" if options.json else f"{len(prompts) * options.samples} completions"
        raise ConfigError(f"stream: got it with {got}; needs one prompt, one sample and plain text")
    directory = checkpoint_directory(options.checkpoint)
    from transformers import TextStreamer  # after everything that can be refused without torch

    from quietstar.inference.completing import complete
    from quietstar.inference.loading import load_thinking
    from quietstar.model.cache import ThinkingRecord

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
    """Returns a line for each thought: the token that follows it, the mixing weight, the text of the thought."""
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


@dataclass(frozen=True, kw_only=True)
class ViewCommandOptions(ViewOptions, CheckpointOptions):
    """Writes one HTML page that shows, token by token, the thoughts of a model about a text and their gains.

    The data is written as JSON beside the page.

    Args:
        text: File or directory of the kinds that training reads; documents are joined by blank lines. `-` is standard
            input.
        field: Field of a row that holds the text, or a chat.
        out: HTML file of the page. Null: thoughts.html in the directory of the checkpoint's run, or in the current
            directory if there is none.
    """

    text: Annotated[str, INPUT_ONCE]
    field: Text = "text"
    out: Path | None = None


VIEW = Command("view", ViewCommandOptions, argument="checkpoint")


def view(options: ViewCommandOptions) -> None:
    """Writes the page of thoughts, and rewrites the report of the run that the checkpoint belongs to.

    Raises:
        ConfigError: An option is out of range, or the model does not exist or cannot think.
        DataError: The text cannot be used.
        CheckpointError: The checkpoint is damaged.
    """
    text_name = "standard input" if options.text == STANDARD_INPUT else Path(options.text).name
    text = read_text(options.text, options.field)
    directory = Path(checkpoint_directory(options.checkpoint))
    run = run_of(directory)
    out = options.out or (run or Path()) / THOUGHTS
    is_directory = path_kind(out, "out") == "directory"
    if is_directory or out.suffix == ".json":
        kind = "a directory" if is_directory else "the name of the data"
        raise ConfigError(f"out: {out} is {kind}, needs the name of a page, e.g. {out.parent / THOUGHTS}")
    make_output_dir(out.parent, "out")
    from quietstar.inference.loading import load_thinking  # after everything that can be refused without torch
    from quietstar.inference.viewed_thoughts import thoughts_of
    from quietstar.reporting.viewer import write_page

    model, tokenizer = load_thinking(directory, device=options.device, dtype=options.dtype, tokenizer=options.tokenizer)
    options = replace(
        options, training_length=training_length(directory), model_name=model_name(directory), text_name=text_name
    )
    with tqdm(desc="thinking", unit="token", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        content = thoughts_of(model, tokenizer, text, options, progress)
    if content["text"]["cut"]:
        name, shown = options.text_name, len(content["text"]["tokens"])
        print(f"{name}: the text continues; only its first {shown} tokens are shown (--tokens)", file=sys.stderr)
    print(write_page(content, out))
    if run is not None and out.resolve() == (run / THOUGHTS).resolve():
        print(write_any_report(run))


USUAL_LENGTH = 256
LENGTH = at_least(2)
"""Bound of a text's length in tokens: the first token predicts the second."""
REPORT = "gate.json"


@dataclass(frozen=True, kw_only=True)
class GateOptions(FitOptions, CheckpointOptions):
    """Fits a thinking gate, which predicts from the text alone the gain of a thought, and writes the model with it.

    The result is a directory for from_pretrained, with the tokenizer and gate.json, which holds the printed table.
    Adapters are merged into the base. generate(think="learned>x") then thinks where the gate predicts more than x nats.

    Args:
        text: Text like the text to be generated: a file or directory of the kinds that training reads.
        out: Directory for the model with its gate; must not exist yet.
        field: Field of a row that holds the text, or a chat.
        special_tokens: Meaning of a special token's text in the text, such as `<|endoftext|>`: `parse`, this token; or
            `text`, its characters.
        length: Number of tokens per text. Null: as in the checkpoint's training run, or 256 without one.
        max_tokens: Largest number of tokens to use, from the beginning of the text.
    """

    text: Annotated[str, INPUT]
    out: Path
    field: Text = "text"
    special_tokens: SpecialTokensMean = "parse"
    length: Annotated[int, LENGTH] | None = None
    max_tokens: Count = 100_000


GATE = Command("gate", GateOptions, argument="checkpoint")


def write_gate(options: GateOptions) -> None:
    """Fits the gate, prints the table and writes the model; a directory that exists is complete.

    Raises:
        ConfigError: An option cannot be used.
        DataError: The text cannot be used, or is too short.
        CheckpointError: The checkpoint is damaged.
    """
    out = options.out
    check_name(out, "out")
    if path_kind(out, "out") is not None or out.is_symlink():
        raise ConfigError(f"out: {out} exists already; choose another name, or remove it")
    if options.length is not None:
        _check_length(options.length, options.max_tokens)
    find_shards(options.text, None, "files", "text", quiet=True)
    directory = checkpoint_directory(options.checkpoint)
    from quietstar.inference.gate import fit_gate  # after everything that can be refused without torch
    from quietstar.inference.loading import load_thinking

    model, tokenizer = load_thinking(directory, device=options.device, dtype=options.dtype, tokenizer=options.tokenizer)
    texts = _read(options, Path(directory), model, tokenizer)
    how = asdict(narrowed(FitOptions, options))
    report = fit_gate(model, texts.tokens, texts.attention_mask, progress=_show_tenths(), **how)
    print(report)
    _save(model, tokenizer, report, out)
    print(f"\nWritten to {out}")


def _check_length(length: int, max_tokens: int) -> None:
    LENGTH.hold("length", length)
    if max_tokens < length:
        raise ConfigError(f"max_tokens: got {max_tokens}, needs at least one text of {length}")


def _read(
    options: GateOptions, directory: Path, model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> PackedTexts:
    from quietstar.data.packing import pack
    from quietstar.data.tokenizer import ChatTemplate

    length = options.length
    if length is None:
        usual = training_length(directory) or USUAL_LENGTH
        context = getattr(model.base.config, "max_position_embeddings", None) or usual + model.config.stream_length
        length = min(usual, context - model.config.stream_length)
    _check_length(length, options.max_tokens)
    special, rows = options.special_tokens == "parse", BadRows()
    template = ChatTemplate(tokenizer, special, TEXT_OPTIONS)
    documents = read_documents(options.text, options.field, rows, render=template, names=TEXT_OPTIONS)
    texts = pack(
        documents,
        tokenizer,
        length,
        tokenizer.eos_token_id is not None,
        separate=True,
        bad_rows=rows,
        special=special,
        names=TEXT_OPTIONS,
    )
    rows.tell_special()
    return texts.part(slice(options.max_tokens // length))


def _show_tenths() -> Callable[[int, int], None]:
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"thought about {done} of {total} texts", file=sys.stderr)

    return show


def _save(model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, report: GateReport, out: Path) -> None:
    """Writes the model under another name first, so that an incomplete directory is never taken for a model."""
    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        with saving(new):
            model.save_pretrained(new)
            tokenizer.save_pretrained(str(new))
        (new / REPORT).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
        new.rename(out)
    except OSError as error:
        raise ConfigError(f"out: cannot write {out} ({error.strerror})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
