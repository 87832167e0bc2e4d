"""Tiny runs of the loop: a model that adds one-digit numbers now right, now wrong, and options that take a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quietstar.config.loops import GeneratorOptions, ProblemOptions
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.examples import encode_example
from quietstar.data.tokenizer import load_tokenizer
from quietstar.model.loading import character_tokenizer, small_llama, weights_sha256
from quietstar.outer_loop.finetune import fine_tune
from quietstar.outer_loop.star import chosen_problems
from quietstar.sampling.requests import sample_seed
from quietstar.tasks import load_task
from quietstar.tasks.addition import LOCAL_CHARACTERS
from quietstar.tasks.task import Problem, Task

TRAIN, TEST = 6, 4
"""Problems of an iteration, and held out."""

OPTIONS: dict[str, Any] = {
    "task": "addition",
    "problems.digits": "1",
    "problems.limit": TRAIN,
    "problems.test_limit": TEST,
    "sampling.samples": 4,
    "sampling.temperature": 1.0,
    "sampling.max_new_tokens": 16,
    "sampling.batch_size": 8,
    "sampling.few_shot": "false",
    "loop.iterations": 1,
    "loop.schedule": "linear",
    "loop.start_steps": 4,
    "loop.added_steps": 1,
    "loop.row_length": 48,
    "training.batch_size": 4,
    "training.learning_rate": 1e-3,
    "training.warmup_steps": 1,
    "training.save_every": 2,
    "training.report": "false",
    "training.device": "cpu",
    "training.threads": 1,
}
VERIFIER: dict[str, Any] = {
    "verifier.steps": 3,
    "verifier.batch_size": 4,
    "verifier.learning_rate": 1e-3,
    "verifier.warmup_steps": 1,
    "verifier.baselines": "true",
    "evaluation.candidates": 3,
    "evaluation.temperature": 1.0,
    "evaluation.ks": "1,2",
    "evaluation.resamples": 20,
}


def arguments(base: Path, output_dir: Path, *more: dict[str, Any], **changes: Any) -> list[str]:
    """The command line of a run, `changes` by dotted key with `__` for the dot; None leaves an option out."""
    options = {"model.path": base, "output_dir": output_dir, **OPTIONS}
    for others in more:
        options |= others
    options |= {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


def sums() -> Task:
    """Of one-digit numbers."""
    return load_task("addition", ProblemOptions(digits="1"))


def drawn(iterations: int = 2) -> list[Problem]:
    """The training problems of the first iterations."""
    problems = sums().problems("train")
    found = [p for i in range(1, iterations + 1) for p in chosen_problems(problems, TRAIN, sample_seed(0, i))]
    return list(dict.fromkeys(found))


def make_base(directory: Path, hidden_size: int = 32) -> Path:
    """A model directory, of a model of this width.

    It knows the problems that are drawn and held out: of three, two right and wrong by halves, and one wrong unless the
    hint is shown.
    """
    task, tokenizer = sums(), character_tokenizer(f"{LOCAL_CHARACTERS}\n", "$")
    end = tokenizer.eos_token_id
    model = small_llama(0, len(tokenizer), layers=1, hidden_size=hidden_size, intermediate_size=64, context=32, end=end)
    model.save_pretrained(directory / "fresh")
    tokenizer.save_pretrained(directory / "fresh")
    problems, texts = [*drawn(), *chosen_problems(task.problems("test"), TEST, 0)], []
    for place, problem in enumerate(problems):
        right = task.solution(problem) or ""
        wrong = f"{right[:-2]}{(int(right[-2]) + 1) % 10}."
        texts += [(task.prompt(problem), wrong), (task.prompt(problem), right if place % 3 else wrong)]
        texts += [(task.prompt(problem, hint=True), right)] * 2
    fine_tune(
        directory / "fresh",
        weights_sha256(model),
        load_tokenizer(directory / "fresh"),
        [encode_example(tokenizer, prompt, completion) for prompt, completion in texts],
        80,
        lambda rows: 120,
        GeneratorOptions(),
        FinetuningOptions(),
        TrainingOptions(batch_size=4, learning_rate=1e-2, warmup_steps=5, report=False, device="cpu", save_every=0),
        directory,
        "the base model",
    )
    return directory / "model"


def manifests(run: Path) -> dict[str, Any]:
    """The content of all manifests, by path."""
    return {str(file.relative_to(run)): json.loads(file.read_bytes()) for file in run.glob("iteration-*/*.json")}


def store_lines(run: Path, kind: str = "sample") -> list[dict[str, Any]]:
    """The lines of one kind of the store."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_bytes().split(b"\n") if line]
    return [line for line in lines if line["kind"] == kind]


def rows(file: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def manifest(run: Path, iteration: int, phase: str) -> dict[str, Any]:
    """Of one phase."""
    content: dict[str, Any] = json.loads((run / f"iteration-{iteration:02d}" / f"{phase}.json").read_bytes())
    return content


def outputs(run: Path, iteration: int, phase: str) -> dict[str, Any]:
    """What it says that came out."""
    found: dict[str, Any] = manifest(run, iteration, phase)["outputs"]
    return found


def kept(run: Path, iteration: int) -> list[dict[str, Any]]:
    """The training examples of an iteration."""
    return rows(run / f"iteration-{iteration:02d}" / "kept.jsonl")


def judged(run: Path) -> list[dict[str, Any]]:
    """The samples with their last verdicts."""
    place = ("iteration", "purpose", "problem", "index")
    verdicts = {tuple(line[name] for name in place): line for line in store_lines(run, "verdict")}
    return [line | verdicts[tuple(line[name] for name in place)] for line in store_lines(run)]
