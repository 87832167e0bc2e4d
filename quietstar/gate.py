"""`python -m quietstar.gate`: fit a thinking gate, so that a model thinks only where it pays."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.config.command_line import run_command
from quietstar.config.values import check_device, parse_positions
from quietstar.data.sources import document_files, read_documents
from quietstar.errors import ConfigError
from quietstar.inference.gate_choices import check_fit
from quietstar.runs.checkpoints import checkpoint_directory
from quietstar.runs.directory import training_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.data.packing import PackedTexts
    from quietstar.inference.gate_choices import GateReport
    from quietstar.model.modeling import QuietStarForCausalLM

LENGTH = 256
REPORT = "gate.json"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: write_gate(arguments))


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = argparse.ArgumentParser(
        prog="python -m quietstar.gate",
        description="Fits a thinking gate, which predicts from the text alone what a thought will gain, and writes the "
        "model with it: a directory for from_pretrained, with the tokenizer and gate.json, the printed table. Adapters "
        'are merged into the base. generate(think="learned>x") then thinks where more than x nats are predicted.',
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a thinking model: a directory, a training run, a hub name")
    p.add_argument("--text", metavar="FILE", required=True, help="text like that to come: .txt, .jsonl, or a directory")
    p.add_argument("--out", metavar="DIRECTORY", required=True, help="where the model goes; must not exist yet")
    p.add_argument("--field", default="text", help="field of a JSONL line that holds the text; default: text")
    p.add_argument("--length", type=int, help=f"tokens per text; default: as in its training run, or else {LENGTH}")
    p.add_argument("--max_tokens", type=int, default=100_000, help="of the beginning of the text; default: 100000")
    p.add_argument("--positions", default="all", help="where to look at gains: all (default), every:N or entropy:K")
    p.add_argument("--held_out", type=float, default=0.25, help="share of the texts for the table; default: 0.25")
    p.add_argument("--batch_size", type=int, default=8, help="texts at once; default: 8")
    p.add_argument("--seed", type=int, default=0, help="of the split into fitted and held-out texts; default: 0")
    p.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint has none")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return p


def write_gate(arguments: argparse.Namespace) -> None:
    """Fits, prints the table and writes the model; a directory that is there is whole.

    Raises:
        ConfigError: An argument cannot be used.
        DataError: The text cannot be used, or is too short.
        CheckpointError: The checkpoint is damaged.
    """
    out = Path(arguments.out)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out: {out} exists already; choose another name, or remove it")
    _check(arguments)
    directory = checkpoint_directory(arguments.checkpoint)
    from quietstar.inference.gate import fit_gate  # after all that can be refused before torch comes
    from quietstar.inference.loading import load_thinking

    model, tokenizer = load_thinking(directory, device=arguments.device, tokenizer=arguments.tokenizer)
    texts = _read(arguments, Path(directory), model, tokenizer)
    report = fit_gate(
        model,
        texts.tokens,
        texts.attention_mask,
        positions=arguments.positions,
        held_out=arguments.held_out,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=_show_tenths(),
    )
    print(report)
    _save(model, tokenizer, report, out)
    print(f"\nWritten to {out}")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.length is not None:
        _check_length(arguments.length, arguments.max_tokens)
    parse_positions(arguments.positions)
    check_fit(arguments.held_out, arguments.batch_size)
    check_device(arguments.device, "device")
    document_files(arguments.text, "text")


def _check_length(length: int, max_tokens: int) -> None:
    if length < 2:
        raise ConfigError(f"length: is {length}, needs at least 2 tokens, the second of which is predicted")
    if max_tokens < length:
        raise ConfigError(f"max_tokens: got {max_tokens}, needs at least one text of {length}")


def _read(
    arguments: argparse.Namespace, directory: Path, model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> PackedTexts:
    from quietstar.data.packing import pack

    length = arguments.length
    if length is None:
        usual = training_length(directory) or LENGTH
        context = getattr(model.base.config, "max_position_embeddings", None) or usual + model.config.stream_length
        length = min(usual, context - model.config.stream_length)
    _check_length(length, arguments.max_tokens)
    documents = read_documents(arguments.text, arguments.field)
    texts = pack(documents, tokenizer, length, tokenizer.eos_token_id is not None, separate=True)
    return texts.part(slice(arguments.max_tokens // length))


def _show_tenths() -> Callable[[int, int], None]:
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"thought about {done} of {total} texts", file=sys.stderr)

    return show


def _save(model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, report: GateReport, out: Path) -> None:
    """Under another name first, so that nobody takes half a model for a whole one."""
    from safetensors import SafetensorError

    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        model.save_pretrained(new)
        tokenizer.save_pretrained(str(new))
        (new / REPORT).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
        new.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"out: cannot write {out} ({error})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
