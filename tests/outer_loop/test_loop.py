"""Whole runs of STaR on a tiny model: what each option makes of the iterations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quietstar import star
from quietstar.config.loops import GeneratorOptions
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.examples import encode_example
from quietstar.data.tokenizer import load_tokenizer
from quietstar.outer_loop.finetune import fine_tune
from quietstar.outer_loop.star import chosen_problems
from quietstar.sampling.requests import sample_seed
from tests.outer_loop.loops import TEST, TRAIN, arguments, judged, kept, manifest, manifests, outputs, store_lines, sums

FEW_SHOT = "#"
"""Solved examples: as short as can be, for the tiny context."""


@pytest.fixture(scope="module")
def other(adder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations, each going on with the model and the data of the one before; few retries; solved examples."""
    out = tmp_path_factory.mktemp("other")
    (out / "shots.txt").write_text(FEW_SHOT)
    assert star.main(_other_arguments(adder, out)) == 0
    return out


def _other_arguments(adder: Path, out: Path) -> list[str]:
    return arguments(
        adder,
        out,
        loop__iterations=2,
        loop__start_from="previous",
        loop__accumulate="all",
        loop__deduplicate="none",
        loop__rationalization_fraction=0.5,
        loop__few_shot_in_training="true",
        loop__keep_models="last",
        sampling__few_shot="true",
        problems__few_shot_path=out / "shots.txt",
        problems__few_shot_hint_path=out / "shots.txt",
    )


def test_each_iteration_starts_from_the_base(plain: Path) -> None:
    base = outputs(plain, 0, "base")["model_sha256"]
    assert [outputs(plain, i, "train")["base_sha256"] for i in (1, 2)] == [base, base]
    assert [outputs(plain, i, "train")["steps"] for i in (1, 2)] == [4, 5]
    first = outputs(plain, 1, "train")["model_sha256"]
    assert manifest(plain, 2, "sample")["inputs"]["model"] == first != base
    assert manifest(plain, 1, "sample")["inputs"]["model"] == base


def test_or_from_the_one_before(other: Path) -> None:
    first = outputs(other, 1, "train")
    assert first["base_sha256"] == outputs(other, 0, "base")["model_sha256"]
    assert outputs(other, 2, "train")["base_sha256"] == first["model_sha256"]


def test_models_that_are_needed_no_more(adder: Path, plain: Path, other: Path) -> None:
    """All stay, or the last alone; a finished run does not miss the others."""
    assert [(plain / f"iteration-0{i}/model").is_dir() for i in (1, 2)] == [True, True]
    assert [(other / f"iteration-0{i}/model").is_dir() for i in (1, 2)] == [False, True]
    assert not list(plain.glob("**/checkpoints")) and not list(other.glob("**/checkpoints"))
    before = manifests(other), store_lines(other)
    assert star.main(_other_arguments(adder, other)) == 0 and (manifests(other), store_lines(other)) == before


def test_what_is_kept_is_what_was_right(plain: Path) -> None:
    """Of the last iteration alone, without equal texts, and with prompts that show no hint."""
    task = sums()
    problems = {problem.id: problem for problem in task.problems("train")}
    for iteration in (1, 2):
        right: dict[tuple[str, str], str] = {}
        for purpose in ("sample", "rationalize"):
            for line in judged(plain):
                if (line["iteration"], line["purpose"], line["correct"]) == (iteration, purpose, True):
                    assert task.check(problems[line["problem"]], line["text"]).correct
                    right.setdefault((line["problem"], task.accepted(line["text"])), purpose)
        found = {(one["problem"], one["completion"]): one["source"] for one in kept(plain, iteration)}
        assert found == right and len(kept(plain, iteration)) == len(right)
        assert all(one["prompt"] == f"{one['problem']}=" for one in kept(plain, iteration))
        assert outputs(plain, iteration, "build")["hinted"] == list(found.values()).count("rationalize")
    sources = {one["source"] for one in kept(plain, 1)}
    assert sources == {"sample", "rationalize"}  # otherwise little has been tested


def test_all_that_was_kept_stays(other: Path) -> None:
    first, second = kept(other, 1), kept(other, 2)
    assert second[: len(first)] == first and len(second) > len(first)
    assert {one["iteration"] for one in second[len(first) :]} == {2}


def test_failures_are_retried_with_the_hint(plain: Path, other: Path) -> None:
    """All of them, or a share; each retry is marked."""
    for run, share in ((plain, 1.0), (other, 0.5)):
        for iteration in (1, 2):
            lines = [line for line in judged(run) if line["iteration"] == iteration]
            sampled = [line for line in lines if line["purpose"] == "sample"]
            solved = {line["problem"] for line in sampled if line["correct"]}
            failed = {line["problem"] for line in sampled} - solved
            retried = {line["problem"] for line in lines if line["purpose"] == "rationalize"}
            assert retried <= failed and len(retried) == round(share * len(failed))
            assert {line["hinted"] for line in sampled} == {False}
            assert all(line["hinted"] == (line["purpose"] == "rationalize") for line in lines)


def test_the_store_has_every_sample_with_a_seed_of_its_own(plain: Path) -> None:
    lines = store_lines(plain)
    seeds = [line["seed"] for line in lines]
    assert len(set(seeds)) == len(seeds)
    for iteration, problems in ((1, TRAIN), (2, TRAIN)):
        places = [
            (line["problem"], line["index"])
            for line in lines
            if line["iteration"] == iteration and line["purpose"] == "sample"
        ]
        assert len(places) == len(set(places)) == problems * 4
    assert sum(line["purpose"] == "evaluate" for line in lines) == 3 * TEST
    wanted = {"key", "iteration", "purpose", "problem", "index", "seed", "hinted", "text", "logprob", "tokens"}
    assert all(wanted < set(line) and line["finish_reason"] in ("stop", "length") for line in lines)
    assert all({"answer", "correct", "failure"} < set(line) for line in judged(plain))
    one = lines[-1]
    parts = (one["iteration"], one["purpose"], one["problem"], one["index"])
    assert one["seed"] == sample_seed(0, *parts)


def trained_again(
    adder: Path, run: Path, out: Path, training: dict[str, Any], few_shot: str = ""
) -> tuple[str, dict[str, Any]]:
    """What fine-tuning the base on the kept examples of the first iteration gives."""
    tokenizer = load_tokenizer(adder)
    examples = [encode_example(tokenizer, few_shot + one["prompt"], one["completion"]) for one in kept(run, 1)]
    options = TrainingOptions(**training | {"seed": sample_seed(0, 1, "train") % 2**31})
    sha256 = outputs(run, 0, "base")["model_sha256"]
    found = fine_tune(
        adder, sha256, tokenizer, examples, 48, lambda _: 4, GeneratorOptions(), FinetuningOptions(), options, out, ""
    )
    return sha256, found


TRAINING: dict[str, Any] = {
    **{"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "save_every": 0},
    **{"report": False, "device": "cpu", "threads": 1},
}


def test_it_is_trained_on_what_is_kept_and_nothing_else(adder: Path, plain: Path, tmp_path: Path) -> None:
    _, found = trained_again(adder, plain, tmp_path, TRAINING)
    assert found == outputs(plain, 1, "train")


def test_solved_examples_before_the_prompts_of_training(adder: Path, other: Path, tmp_path: Path) -> None:
    before = f"{FEW_SHOT}\n\n"
    _, found = trained_again(adder, other, tmp_path / "with", TRAINING, before)
    assert found == outputs(other, 1, "train")
    _, found = trained_again(adder, other, tmp_path / "without", TRAINING)
    assert found["model_sha256"] != outputs(other, 1, "train")["model_sha256"]
    assert not any(FEW_SHOT in one["prompt"] for one in kept(other, 1))


def test_human_solutions_first_and_no_iterations(adder: Path, tmp_path: Path) -> None:
    options = {"loop__iterations": 0, "loop__supervised_start": "true", "loop__supervised_steps": 2}
    assert star.main(arguments(adder, tmp_path, **options)) == 0
    trained = outputs(tmp_path, 0, "train")
    assert trained["steps"] == 2 and trained["base_sha256"] == outputs(tmp_path, 0, "base")["model_sha256"]
    assert manifest(tmp_path, 0, "evaluate")["inputs"]["model"] == trained["model_sha256"]
    assert {line["purpose"] for line in store_lines(tmp_path)} == {"evaluate"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["iteration"] for row in summary["iterations"]] == [0]


def test_the_problems_of_an_iteration() -> None:
    problems = sums().problems("train")
    chosen = [chosen_problems(problems, 10, sample_seed(0, iteration)) for iteration in range(1, 4)]
    assert len({tuple(one.id for one in part) for part in chosen}) == 3
    assert chosen_problems(problems, None, 0) == chosen_problems(problems, 1000, 0) == list(problems)
    assert [problems.index(one) for one in chosen[0]] == sorted(problems.index(one) for one in chosen[0])
