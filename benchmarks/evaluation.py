"""The evaluation command on the real held-out problems of GSM8K and CommonsenseQA, with a small model.

    QUIETSTAR_DATA=DATA python benchmarks/evaluation.py

A model of a few million parameters reads the training problems in the format of the evaluation, and some of WikiText-2,
as a plain language model; then Quiet-STaR trains it on the same text; then `quietstar.evaluate` measures it on problems
and text that it has not read. A model of this size does not reason: its numbers show that the measures run and what
they look like, and say nothing about the method. DATA holds the folders gsm8k, commonsenseqa and wikitext2.
Writes evaluation.md to `--results`; what is finished is kept in `--output`, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
import transformers
from transformers import AutoTokenizer

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from benchmarks.small_model import save_small_model
from quietstar import QuietStarForCausalLM
from quietstar.evaluate import main as evaluate
from quietstar.evaluation.answers import STEP_BY_STEP, AnswerFormat, load_format
from quietstar.reporting.evaluation_page import HEAD, direction, group_table, results_table
from quietstar.runs.checkpoints import latest_checkpoint
from quietstar.train import main as train

VOCABULARY = 4096
SIZES = {"layers": 4, "hidden_size": 192, "intermediate_size": 512}
TEXT_BYTES = 1_500_000


def documents(data: Path) -> list[str]:
    """Training problems with their answers, GSM8K's also after their solutions, and paragraphs of WikiText-2."""
    found = []
    for name in ("gsm8k", "commonsenseqa"):
        form = load_format(name, data)
        for problem in form.task.problems("train"):
            found.append(f"{form.prompt(problem)} {form.answer(problem)}\n")
            if problem.rationale is not None:
                found.append(
                    f"{form.prompt(problem)}{STEP_BY_STEP}{reasoning(form, problem.rationale, problem.answer)}"
                )
    text = (data / "wikitext2" / "train.txt").read_text(encoding="utf-8")[:TEXT_BYTES]
    found += [paragraph for paragraph in text.split("\n") if len(paragraph) > 100]
    random.Random(0).shuffle(found)
    return found


def reasoning(form: AnswerFormat, rationale: str, answer: str) -> str:
    """A solution and its answer as the chain of thought's second stage asks for it."""
    return f" {rationale.partition('####')[0].strip()}{form.conclusion} {answer}\n"


def run(command: Any, name: str, arguments: dict[str, Any], positional: list[str] | None = None) -> str:
    """One command; returns its line."""
    words = [*(positional or []), *(word for key, value in arguments.items() for word in (f"--{key}", str(value)))]
    line = f"python -m quietstar.{name} {' '.join(words)}"
    print(line, flush=True)
    start = time.perf_counter()
    if command(words):
        raise SystemExit(1)
    print(f"took {time.perf_counter() - start:.0f} s", flush=True)
    return line


def make_thinking(out: Path, data: Path, options: argparse.Namespace) -> tuple[Path, list[str]]:
    """The trained model, and the commands that trained it."""
    fresh, read, corpus = out / "fresh", out / "read", out / "train.jsonl"
    if not fresh.is_dir():
        texts = documents(data)
        out.mkdir(parents=True, exist_ok=True)
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        sizes = {"layers": 1, "hidden_size": 32, "intermediate_size": 64} if options.quick else SIZES
        save_small_model(fresh, texts, VOCABULARY, **sizes, context=1024)
    common = {
        "data.path": corpus,
        "data.validation_fraction": 0.01,
        "training.threads": options.threads,
        "training.adam_beta2": 0.98,
        "training.weight_decay": 0.01,
        "training.device": options.device,
    }
    commands = [
        run(
            train,
            "train",
            {
                "model.path": fresh,
                "output_dir": out / "reading",
                **common,
                "training.method": "language_modeling",
                "training.steps": options.reading_steps,
                "training.batch_size": 8,
                "data.length": 192,
                "training.learning_rate": 2e-3,
                "training.warmup_steps": 50,
                "training.eval_batches": 4,
            },
        )
    ]
    reading = latest_checkpoint(out / "reading" / "checkpoints")
    assert reading is not None
    if not read.is_dir():
        QuietStarForCausalLM.from_pretrained(reading).base.save_pretrained(out / "read.new")
        AutoTokenizer.from_pretrained(reading).save_pretrained(out / "read.new")
        shutil.move(out / "read.new", read)
    commands.append(
        run(
            train,
            "train",
            {
                "model.path": read,
                "output_dir": out / "thinking",
                **common,
                "model.positions": "entropy:0.25",
                "training.steps": options.steps,
                "training.batch_size": 8,
                "data.length": 96,
                "training.learning_rate": 2e-4,
                "training.thought_embedding_lr_multiplier": 10,
                "training.eval_every": 50,
            },
        )
    )
    return out / "thinking", commands


def parameters(run: Path) -> float:
    """Millions of them in the model that a run has trained."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return sum(one.numel() for one in QuietStarForCausalLM.from_pretrained(checkpoint).parameters()) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_folders("runs/evaluation")
    parser.add_data("gsm8k/, commonsenseqa/ and wikitext2/")
    parser.add_argument("--reading-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--problems", type=int, help="of each task; default: all held-out problems")
    parser.add_argument("--cot-problems", type=int, default=128, help="of GSM8K, as in the paper")
    parser.add_threads(2)
    parser.add_argument("--device", default="cpu")
    parser.add_quick(reading_steps=2, steps=2, problems=2, cot_problems=2)
    options = parser.begin(arguments)
    transformers.utils.logging.disable_progress_bar()
    model, commands = make_thinking(options.output, options.data, options)
    torch.set_num_threads(options.threads)  # training has set its own
    common = {"data": options.data, "batch_size": 32, "device": options.device}
    everything = options.output / "everything"
    begun = everything.is_dir()
    asked: dict[str, Any] = {"tasks": "gsm8k,commonsenseqa", "metrics": "soft,exact", "max_new_tokens": 32, **common}
    if options.problems is not None:
        asked["problems"] = options.problems
    asked |= {"text": options.data / "wikitext2" / "test.txt", "output_dir": everything}
    commands.append(run(evaluate, "evaluate", asked, [str(model)]))
    chains = options.output / "chains"
    asked = {"tasks": "gsm8k", "metrics": "cot", "max_new_tokens": 96, "problems": options.cot_problems, **common}
    commands.append(run(evaluate, "evaluate", asked | {"output_dir": chains}, [str(model)]))
    found = [json.loads((out / "evaluation.json").read_text(encoding="utf-8")) for out in (everything, chains)]
    results = [row for one in found for row in one["results"]]
    parts = [
        f"A model of {parameters(model):.1f} million parameters that has read the training problems in this format and "
        "some of WikiText-2 for some minutes; what it gets right shows the measures at work and says nothing of the "
        "method. It was trained to think at the quarter of the positions where it is least sure, and is asked to think "
        "at all of them. 95 % bootstrap intervals; the difference is paired, on the same items.",
        markdown_table(HEAD, results_table(results), text_columns=2),
    ]
    for row in results:
        for kind, groups in row["groups"].items():
            head = [f"{row['metric']} by {kind} ({row['unit']})", *HEAD[2:]]
            parts.append(markdown_table(head, group_table(groups, row["unit"], direction(row, kind))))
            if kind in row["caveats"]:
                parts.append(row["caveats"][kind])
    parts.append("\n".join(dict.fromkeys(f"- {row['metric']}: {row['statement']}" for row in results)))
    if begun:
        parts.append("Items that an interrupted run of this script had measured were not measured again.")
    parts.append("The commands (DATA is the folder of the data, OUTPUT that of the runs):")
    shown = [line.replace(str(options.data), "DATA").replace(str(options.output), "OUTPUT") for line in commands]
    parts.append("\n".join(f"    {line}" for line in shown))
    title = "The evaluation on real problems, with a small model"
    parser.write(options.results / "evaluation", title, "\n\n".join(parts))


if __name__ == "__main__":
    main()
