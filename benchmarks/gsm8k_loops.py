"""Both loops on GSM8K's own problems and prompts, with a small model that has read nothing but some of GSM8K.

    QUIETSTAR_DATA=DATA python benchmarks/gsm8k_loops.py

It shows that every phase runs on real data in the published prompt format: six solved examples before each question,
the hint after it, calculator annotations, `####`. A model of a million parameters does not learn to reason: this one
has read half of the training problems so often that it remembers some of them, and its accuracy says nothing about the
methods. DATA/gsm8k holds train.jsonl and test.jsonl.
Writes gsm8k_loops.md to `--results`; what is finished is kept in `--output`, and the same command goes on.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from benchmarks.small_model import save_small_model
from quietstar.config.command_line import parse_config
from quietstar.config.commands import STAR, VSTAR
from quietstar.config.loops import GeneratorOptions, OuterLoopConfig, ProblemOptions
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.examples import encode_example
from quietstar.outer_loop.finetune import MODEL, fine_tune, forget_checkpoints, weights_sha256
from quietstar.outer_loop.run import run_outer_loop
from quietstar.tasks.registry import load_task

VOCABULARY = 2048
SIZES = {"layers": 3, "hidden_size": 192, "intermediate_size": 512}
ROW = 3072
QUICK_ROW = 256
"""Without the solved examples before a question: to have read those takes minutes."""
QUICK = (
    *("--sampling.few_shot", "false", "--sampling.max_new_tokens", "48", "--loop.row_length", str(QUICK_ROW)),
    *("--loop.iterations", "1", "--loop.start_steps", "2"),
)
QUICK_VERIFIER = (
    *("--sampling.max_new_tokens", "48", "--loop.row_length", str(QUICK_ROW), "--loop.iterations", "1"),
    *("--loop.supervised_steps", "2", "--sampling.samples", "4"),
    *("--evaluation.candidates", "2", "--verifier.steps", "2"),
)
WITH_EXAMPLES = 0.25
"""Share of the base model's texts that have the solved examples before them: it has to know such long prompts."""


def make_base(out: Path, problems: ProblemOptions, steps: int, quick: bool) -> Path:
    """A small Llama that has read the first half of the training problems with their solutions."""
    if (out / MODEL).is_dir():
        return out / MODEL
    task = load_task("gsm8k", problems)
    shown = task.demonstrations()
    texts = [one.prompt + one.completion for one in shown]
    sizes = {"layers": 1, "hidden_size": 64, "intermediate_size": 128} if quick else SIZES
    model, tokenizer = save_small_model(out / "fresh", texts, VOCABULARY, **sizes, context=4096)
    rng, before = random.Random(0), task.few_shot()
    share, row = (0.0, QUICK_ROW) if quick else (WITH_EXAMPLES, ROW)
    examples = [
        encode_example(tokenizer, (before if rng.random() < share else "") + one.prompt, one.completion, one.name)
        for one in shown[: len(shown) // 2] * 4
    ]
    training = TrainingOptions(
        method="language_modeling",
        batch_size=2,
        learning_rate=2e-3,
        warmup_steps=20,
        weight_decay=0.01,
        adam_beta2=0.98,
        log_every=50,
        keep_checkpoints=1,
        device="cpu",
    )
    fine_tune(
        out / "fresh",
        weights_sha256(model),
        tokenizer,
        examples,
        row,
        lambda rows: steps,
        GeneratorOptions(),
        FinetuningOptions(),
        training,
        out,
        "the base model",
    )
    forget_checkpoints(out)
    return out / MODEL


def star_options(problems: ProblemOptions, base: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """STaR with the paper's numbers, but for the type of the weights, the rate, and fewer problems and steps."""
    return [
        *("--preset", "star-paper", "--task", "gsm8k", "--model.path", str(base), "--output_dir", str(out)),
        *("--model.dtype", "float32", "--training.device", "cpu", "--training.learning_rate", "3e-4"),
        *("--training.warmup_steps", "5", "--loop.start_steps", "20", "--loop.iterations", "2"),
        *("--sampling.batch_size", "32"),
        *("--problems.test_limit", str(options.held_out)),
        *("--training.batch_size", "2", "--problems.path", str(problems.path)),
        *(QUICK if options.quick else ()),
    ]


def vstar_options(problems: ProblemOptions, base: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """V-STaR with the paper's numbers, but for the same, fewer samples and candidates, and no adapters."""
    return [
        *("--preset", "vstar", "--task", "gsm8k", "--model.path", str(base), "--output_dir", str(out)),
        *("--model.dtype", "float32", "--training.device", "cpu", "--finetuning.lora_rank", "0"),
        *("--loop.supervised_steps", "10", "--loop.start_epochs", "1", "--training.batch_size", "4"),
        *("--loop.iterations", "2", "--sampling.samples", "8", "--sampling.batch_size", "64"),
        *("--problems.test_limit", str(options.held_out)),
        *("--evaluation.candidates", "16", "--verifier.steps", "40", "--verifier.batch_size", "8"),
        *("--verifier.baselines", "true", "--problems.path", str(problems.path)),
        *(QUICK_VERIFIER if options.quick else ()),
    ]


def iterations_table(summary: dict[str, Any]) -> str:
    rows = []
    for row in summary["iterations"]:
        sampled, again, built = (row.get(name, {}) for name in ("sampled", "rationalized", "built"))
        held_out, trained = row.get("held_out", {}), row.get("trained", {})
        rows.append(
            [
                str(row["iteration"]),
                f"{sampled['correct']} of {sampled['samples']}" if sampled else "",
                f"{again['correct']} of {again['samples']}" if again else "",
                str(built.get("kept", "")),
                str(trained.get("steps", "")),
                f"{held_out['correct']} of {held_out['problems']}" if held_out else "",
                f"{held_out['truncated']:.0%}" if held_out else "",
            ]
        )
    heads = ["iteration", "right samples", "right with hint", "kept", "steps", "held out, greedy", "cut off"]
    return markdown_table(heads, rows, text_columns=0)


def candidates_table(table: dict[str, Any]) -> str:
    ks = sorted({row["k"] for row in table["rows"]})
    lines: dict[str, dict[int, str]] = {}
    for row in table["rows"]:
        if row["measure"] != "weighted-vote":
            name = f"{row['measure']} {row['score'] or ''}".strip()
            value = row["value"]
            lines.setdefault(name, {})[row["k"]] = f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    rows = [[name, *[cells[k] for k in ks]] for name, cells in lines.items()]
    return markdown_table(["at k", *map(str, ks)], rows, text_columns=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_folders("runs/gsm8k-loops")
    parser.add_data("gsm8k/")
    parser.add_argument("--steps", type=int, default=250, help="of the base model's training")
    parser.add_argument("--problems", type=int, default=128, help="to learn from, the first ones")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_threads()
    parser.add_quick(steps=80, problems=4, held_out=2)
    options = parser.begin(arguments)
    transformers.utils.logging.disable_progress_bar()
    folder, own = options.data / "gsm8k", options.output / "problems"
    own.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", options.problems), ("test", None)):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (own / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    problems = ProblemOptions(path=str(own))
    base = make_base(options.output / "base", problems, options.steps, options.quick)
    parts = [
        f"{options.problems} training problems, of which the model has read the first half with their solutions, so "
        "that what it gets right of those it remembers. Intervals are bootstrapped over problems.\n"
    ]
    for name, command, words, verifies in (
        ("STaR", STAR, star_options(problems, base, options.output / "star", options), False),
        ("V-STaR", VSTAR, vstar_options(problems, base, options.output / "vstar", options), True),
    ):
        config: OuterLoopConfig = parse_config(command, words)
        summary = run_outer_loop(config, verifies)
        parts.append(f"## {name}\n\n{iterations_table(summary)}\n")
        if "candidates" in summary:
            parts.append(candidates_table(summary["candidates"]) + "\n")
        parts += [f"- {warning}\n" for warning in summary["warnings"]]
    parser.write(options.results / "gsm8k_loops", "Both loops on GSM8K, with a small model", "\n".join(parts))


if __name__ == "__main__":
    main()
