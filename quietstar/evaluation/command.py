"""The `evaluate` command: refuses what it can without torch, measures, and writes the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.evaluation.settings import UNBOUNDED, USUAL_LENGTH, Settings, prepare
from quietstar.reporting.evaluation_page import evaluation_page, evaluation_text
from quietstar.runs.checkpoints import checkpoint_directory
from quietstar.runs.directory import model_name, training_length
from quietstar.runs.files import THOUGHTS, write_whole
from quietstar.runs.machine import environment

if TYPE_CHECKING:
    from quietstar.model.modeling import QuietStarForCausalLM


VIEWED_TOKENS = 2000
"""Largest number of tokens of the text on the page of thoughts."""


def evaluate_checkpoint(settings: Settings) -> None:
    """Evaluates a checkpoint; writes `evaluation.json` and `evaluation.html`, and prints a table.

    Raises:
        ConfigError: An option cannot be used.
        DataError: A line of the data is wrong.
        CheckpointError: The checkpoint is damaged.
    """
    inputs = prepare(settings)
    checkpoint = Path(checkpoint_directory(settings.checkpoint))
    from quietstar.evaluation.item_store import so_far
    from quietstar.evaluation.run import evaluate, report  # after everything that can be refused without torch
    from quietstar.evaluation.subject import context_of
    from quietstar.inference.loading import load_thinking
    from quietstar.inference.viewed_thoughts import write_view

    facts = environment()
    model, tokenizer = load_thinking(
        checkpoint, device=settings.device, dtype=settings.dtype, tokenizer=settings.tokenizer
    )
    trained = training_length(checkpoint)
    settings = settings.with_length(trained, context_of(model))
    found = evaluate(model, tokenizer, settings, inputs)
    content = report(model_name(checkpoint), settings, inputs, found, facts)
    write_whole(settings.output_dir / "evaluation.json", json.dumps(content, indent=1) + "\n")
    page = settings.output_dir / "evaluation.html"
    write_whole(page, evaluation_page(content))
    print(evaluation_text(content))
    if settings.text is not None and inputs.text is not None:
        options = _view_options(model, settings, trained) | {
            "model_name": model_name(checkpoint),
            "text_name": settings.text.name,
        }
        try:
            with so_far("page of thoughts") as progress:
                viewer = write_view(
                    model, tokenizer, inputs.text, settings.output_dir / THOUGHTS, progress=progress, **options
                )
            write_whole(page, evaluation_page(content, viewer.name))
        except Exception as error:  # of any kind: the evaluation itself is complete
            print(f"{THOUGHTS}: could not be made: {error}", file=sys.stderr)
    print(f"\nwrote {settings.output_dir / 'evaluation.json'} and {page.name}")


def _view_options(model: QuietStarForCausalLM, settings: Settings, trained: int | None) -> dict[str, Any]:
    """Returns options of the page of thoughts: thoughts as in the evaluation, in windows as long as the context
    allows.
    """
    config = model.config
    context = getattr(model.base.config, "max_position_embeddings", None) or UNBOUNDED
    window = min(max(settings.length or USUAL_LENGTH, 2 * config.lookahead + 2), context - config.stream_length)
    return {
        "tokens": min(VIEWED_TOKENS, settings.text_tokens),
        "window": window,
        "training_length": trained,
        "greedy": True,
        "special_tokens": settings.special_tokens,
    }
