"""`python -m quietstar.evaluate CHECKPOINT`: what thinking is worth, on problems, on a text, and in lm-eval."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.config.command_line import run_command
from quietstar.config.values import DTYPES, check_device
from quietstar.evaluation.settings import METRICS, TASKS, UNBOUNDED, USUAL_LENGTH, Settings, prepare
from quietstar.reporting.evaluation_page import evaluation_page, evaluation_text
from quietstar.runs.checkpoints import checkpoint_directory
from quietstar.runs.directory import model_name, training_length
from quietstar.runs.files import THOUGHTS, write_whole
from quietstar.runs.machine import environment

if TYPE_CHECKING:
    from quietstar.model.modeling import QuietStarForCausalLM

VIEWED_TOKENS = 2000
"""Of the text, on the page of thoughts."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: evaluate_command(arguments))


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    default = Settings(Path("evaluation"))
    p = argparse.ArgumentParser(
        prog="python -m quietstar.evaluate",
        description="Measures a model with thinking on and off on the same items. The same command goes on with an "
        "evaluation that was killed.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="model directory, directory of a training run, or hub name")
    p.add_argument("--output_dir", metavar="DIR", type=Path, default=default.output_dir, help="default: %(default)s")
    p.add_argument("--tasks", metavar="NAMES", default="", help=f"some of {','.join(TASKS)}")
    p.add_argument("--data", metavar="DIR", type=Path, help="with a folder for each task; default: their public homes")
    p.add_argument(
        "--metrics",
        metavar="NAMES",
        default=",".join(default.metrics),
        help=f"of the tasks, some of {','.join(METRICS)}: the paper's accuracy, greedy answers, votes over chains of "
        f"thought; default: %(default)s",
    )
    p.add_argument("--problems", metavar="N", type=int, help="of each task, drawn by --seed; default: all")
    p.add_argument("--think", default=default.think, help="when to think while generating; default: %(default)s")
    p.add_argument("--text", metavar="FILE", type=Path, help="held-out text, for the NLL and the page of thoughts")
    p.add_argument(
        "--text_tokens", metavar="N", type=int, default=default.text_tokens, help="of it; default: %(default)s"
    )
    p.add_argument(
        "--length",
        metavar="N",
        type=int,
        help=f"tokens of a window; default: as in training, or {USUAL_LENGTH} where that is unknown",
    )
    p.add_argument("--lm_eval", metavar="NAMES", default="", help="lm-eval tasks, or YAML files of such")
    p.add_argument(
        "--votes", metavar="N", type=int, default=default.votes, help="chains of thought; default: %(default)s"
    )
    p.add_argument("--temperature", type=float, default=default.temperature, help="of these; default: %(default)s")
    p.add_argument(
        "--max_new_tokens", metavar="N", type=int, default=default.max_new_tokens, help="default: %(default)s"
    )
    p.add_argument("--batch_size", metavar="N", type=int, default=default.batch_size, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as saved")
    p.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint has none")
    return p


def evaluate_command(arguments: argparse.Namespace) -> None:
    """Evaluates a checkpoint; writes `evaluation.json` and `evaluation.html`, and prints a table.

    Raises:
        ConfigError: An argument cannot be used.
        DataError: A line of the data is wrong.
        CheckpointError: The checkpoint is damaged.
    """
    settings = read_settings(arguments)
    check_device(arguments.device, "device")
    inputs = prepare(settings)
    checkpoint = Path(checkpoint_directory(arguments.checkpoint))
    from quietstar.evaluation.item_store import so_far
    from quietstar.evaluation.run import evaluate, report  # after all that can be refused before torch comes
    from quietstar.evaluation.subject import context_of
    from quietstar.inference.loading import load_thinking
    from quietstar.inference.viewed_thoughts import write_view

    facts = environment()
    model, tokenizer = load_thinking(
        checkpoint, device=arguments.device, dtype=arguments.dtype, tokenizer=arguments.tokenizer
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
        except Exception as error:  # whatever it is, the evaluation itself is done
            print(f"{THOUGHTS}: could not be made: {error}", file=sys.stderr)
    print(f"\nwrote {settings.output_dir / 'evaluation.json'} and {page.name}")


def _view_options(model: QuietStarForCausalLM, settings: Settings, trained: int | None) -> dict[str, Any]:
    """Of the page of thoughts: as they are evaluated, in windows as long as there is room for."""
    config = model.config
    context = getattr(model.base.config, "max_position_embeddings", None) or UNBOUNDED
    window = min(max(settings.length or USUAL_LENGTH, 2 * config.lookahead + 2), context - config.stream_length)
    return {
        "tokens": min(VIEWED_TOKENS, settings.text_tokens),
        "window": window,
        "training_length": trained,
        "greedy": True,
    }


def read_settings(arguments: argparse.Namespace) -> Settings:
    """The options that say what is measured."""
    given = dict(vars(arguments))
    for name in ("checkpoint", "device", "dtype", "tokenizer"):
        del given[name]
    for name in ("tasks", "metrics", "lm_eval"):
        given[name] = tuple(part for part in map(str.strip, given[name].split(",")) if part)
    return Settings(**given)


if __name__ == "__main__":
    raise SystemExit(main())
