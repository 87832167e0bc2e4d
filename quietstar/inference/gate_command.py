"""What `quietstar.gate` does: fits a thinking gate to a text, and writes the model with it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from quietstar.config.checkpoint import CheckpointOptions
from quietstar.config.command_line import Command, narrowed
from quietstar.config.options import at_least
from quietstar.data.sources import document_files, read_documents
from quietstar.errors import ConfigError
from quietstar.inference.gate_choices import FitOptions
from quietstar.runs.checkpoints import checkpoint_directory
from quietstar.runs.directory import training_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.data.packing import PackedTexts
    from quietstar.inference.gate_choices import GateReport
    from quietstar.model.modeling import QuietStarForCausalLM

USUAL_LENGTH = 256
LENGTH = at_least(2)
"""Tokens, the second of which is predicted."""
REPORT = "gate.json"


@dataclass(frozen=True, kw_only=True)
class GateOptions(FitOptions, CheckpointOptions):
    """Fits a thinking gate, which predicts from the text alone what a thought will gain, and writes the model with it.

    The result is a directory for from_pretrained, with the tokenizer and gate.json, the printed table. Adapters are
    merged into the base. generate(think="learned>x") then thinks where more than x nats are predicted.

    Args:
        text: Text like that to come: a .txt or .jsonl file, or a directory of them.
        out: Directory of the model with its gate; must not exist yet.
        field: Field of a JSONL line that holds the text.
        length: Tokens of each text. Null: as in the checkpoint's training run, or else 256.
        max_tokens: Tokens of the text to use, from the beginning.
    """

    text: str
    out: Path
    field: str = "text"
    length: Annotated[int, LENGTH] | None = None
    max_tokens: int = 100_000


GATE = Command("gate", GateOptions, argument="checkpoint")


def write_gate(options: GateOptions) -> None:
    """Fits, prints the table and writes the model; a directory that is there is whole.

    Raises:
        ConfigError: An option cannot be used.
        DataError: The text cannot be used, or is too short.
        CheckpointError: The checkpoint is damaged.
    """
    out = options.out
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out: {out} exists already; choose another name, or remove it")
    if options.length is not None:
        _check_length(options.length, options.max_tokens)
    document_files(options.text, "text")
    directory = checkpoint_directory(options.checkpoint)
    from quietstar.inference.gate import fit_gate  # after all that can be refused before torch comes
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

    length = options.length
    if length is None:
        usual = training_length(directory) or USUAL_LENGTH
        context = getattr(model.base.config, "max_position_embeddings", None) or usual + model.config.stream_length
        length = min(usual, context - model.config.stream_length)
    _check_length(length, options.max_tokens)
    documents = read_documents(options.text, options.field)
    texts = pack(documents, tokenizer, length, tokenizer.eos_token_id is not None, separate=True)
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
