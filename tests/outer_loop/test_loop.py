"""Whole runs of STaR on a tiny model: what each option makes of the iterations, and what a second call finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar import star
from quietstar.config import FinetuningOptions, TrainingOptions
from quietstar.data import load_tokenizer
from quietstar.data.examples import encode_example
from quietstar.outer_loop.finetune import fine_tune
from quietstar.outer_loop.options import GeneratorOptions
from quietstar.outer_loop.sampling import sample_seed
from quietstar.outer_loop.star import chosen_problems
from quietstar.training.run_lock import RunLock
from tests.faults.launch import Zygote
from tests.outer_loop.loops import TEST, TRAIN, VERIFIER, arguments, manifests, rows, store_lines, sums

Run = Callable[..., Path]
FEW_SHOT = "#"
"""Solved examples: as short as can be, for the tiny context."""


@pytest.fixture(scope="module")
def plain(adder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations as in the paper."""
    out = tmp_path_factory.mktemp("plain")
    assert star.main(arguments(adder, out, loop__iterations=2)) == 0
    return out


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


def manifest(run: Path, iteration: int, phase: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / f"iteration-{iteration:02d}" / f"{phase}.json").read_bytes())
    return content


def outputs(run: Path, iteration: int, phase: str) -> dict[str, Any]:
    found: dict[str, Any] = manifest(run, iteration, phase)["outputs"]
    return found


def kept(run: Path, iteration: int) -> list[dict[str, Any]]:
    return rows(run / f"iteration-{iteration:02d}" / "kept.jsonl")


def judged(run: Path) -> list[dict[str, Any]]:
    """The samples with their last verdicts."""
    place = ("iteration", "purpose", "problem", "index")
    verdicts = {tuple(line[name] for name in place): line for line in store_lines(run, "verdict")}
    return [line | verdicts[tuple(line[name] for name in place)] for line in store_lines(run)]


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


def test_the_same_command_again_does_nothing(adder: Path, plain: Path, tmp_path: Path) -> None:
    run = copied(plain, tmp_path)
    before = manifests(run), (run / "samples.jsonl").read_bytes(), (run / "summary.json").read_bytes()
    assert star.main(arguments(adder, run, loop__iterations=2)) == 0
    assert (manifests(run), (run / "samples.jsonl").read_bytes(), (run / "summary.json").read_bytes()) == before


def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_missing_manifests_are_made_again(adder: Path, plain: Path, tmp_path: Path) -> None:
    """And the same; no sample is made again."""
    run = copied(plain, tmp_path)
    before, samples = manifests(run), store_lines(run)
    for name in before:
        (run / name).unlink()
    assert star.main(arguments(adder, run, loop__iterations=2)) == 0
    assert manifests(run) == before and store_lines(run) == samples


def error_of(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The one line that a refused command ends with."""
    capsys.readouterr()
    assert star.main(command) == 2
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(found) == 1
    return found[0]


def test_tampered_files_are_named(adder: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(plain, tmp_path)
    command = arguments(adder, run, loop__iterations=2)
    before = manifests(run)
    (run / "iteration-02/build.json").write_text("{")
    assert "iteration-02/build.json: cannot be read" in error_of(capsys, command)
    (run / "iteration-02/build.json").unlink()
    (run / "iteration-01/kept.jsonl").write_text("")
    assert "iteration-01/kept.jsonl: is not what the run wrote; delete build.json" in error_of(capsys, command)
    (run / "iteration-01/build.json").unlink()
    assert star.main(command) == 0 and manifests(run) == before


def test_lost_lines_of_the_store_are_made_again(
    adder: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the message about a damaged line advises."""
    run = copied(plain, tmp_path)
    command = arguments(adder, run, loop__iterations=2)
    file, samples, verdicts = run / "samples.jsonl", store_lines(run), judged(run)
    lines = file.read_bytes().splitlines(keepends=True)
    lost = [
        next(i for i, line in enumerate(lines) if b'"sample"' in line and kind in line)
        for kind in (b'"seed"', b'"correct"')
    ]
    file.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in lost))
    assert star.main(command) == 0
    order = str
    assert sorted(store_lines(run), key=order) == sorted(samples, key=order)
    assert sorted(judged(run), key=order) == sorted(verdicts, key=order)
    changed = file.read_bytes().replace(b'"text": "', b'"text": "0', 1)
    file.write_bytes(changed)
    assert "samples.jsonl: is not what evaluate of iteration 0 has left there" in error_of(capsys, command)


def test_other_options_are_refused_and_redone(
    adder: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples that still fit stay as they are."""
    run = copied(plain, tmp_path)
    changes: dict[str, Any] = {"loop__iterations": 1, "loop__max_per_problem": 1, "loop__deduplicate": "none"}
    changes["loop__rationalize"] = "false"
    text = error_of(capsys, arguments(adder, run, **changes))
    assert "build was done with other inputs: loop.deduplicate was 'exact' and is 'none'" in text
    assert "loop.max_per_problem was None and is 1; rationalize was " in text and "--loop.redo" in text
    before = store_lines(run)
    assert star.main(arguments(adder, run, loop__redo="true", **changes)) == 0
    assert store_lines(run)[: len(before)] == before
    again = store_lines(run)[len(before) :]
    assert all((line["iteration"], line["purpose"]) != (1, "sample") for line in again)
    names = [one["problem"] for one in kept(run, 1)]
    assert len(names) == len(set(names))
    summary = json.loads((run / "summary.json").read_text())  # what the first run has left is no part of it
    assert [row["iteration"] for row in summary["iterations"]] == [0, 1]
    assert "rationalized" in json.loads((plain / "summary.json").read_text())["iterations"][1]
    assert "rationalized" not in summary["iterations"][1]


def test_another_base_is_refused(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between two iterations somebody has trained the base on."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(adder, base)
    options = {"evaluation__greedy": "false", "loop__rationalize": "false"}
    assert star.main(arguments(base, run, loop__iterations=1, **options)) == 0
    weights = load_file(base / "model.safetensors")
    with torch.no_grad():
        next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    text = error_of(capsys, arguments(base, run, loop__iterations=2, **options))
    assert "base was done with other inputs: model_sha256 was " in text


OWN_TASK = """
from quietstar.tasks.addition import Addition
from quietstar.tasks.task import Verdict

class Own(Addition):
    def check(self, problem, completion):
        found = super().check(problem, completion)
        return {verdict}

def make(options):
    return Own(options)
"""


def test_verifying_again_never_samples_again(adder: Path, tmp_path: Path) -> None:
    """Somebody finds that their check was too strict, mends it, and deletes the manifest."""
    file, run = tmp_path / "own.py", tmp_path / "run"
    file.write_text(OWN_TASK.format(verdict="Verdict(found.answer, found.correct and completion.startswith('4'))"))
    options = {"task": f"{file}:make", "evaluation__greedy": "false", "loop__rationalize": "false"}
    assert star.main(arguments(adder, run, **options)) == 0
    strict, samples = outputs(run, 1, "verify_sample"), store_lines(run)
    file.write_text(OWN_TASK.format(verdict="found"))
    (run / "iteration-01/verify_sample.json").unlink()
    assert star.main(arguments(adder, run, loop__redo="true", **options)) == 0
    assert store_lines(run) == samples
    assert outputs(run, 1, "verify_sample")["correct"] > strict["correct"] > 0
    right = {line["text"] for line in judged(run) if line["correct"]}
    assert {one["completion"] for one in kept(run, 1)} == right


def test_a_directory_in_use_is_refused(adder: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(plain):
        assert "is in use by process" in error_of(capsys, arguments(adder, plain, loop__iterations=2))


def test_a_signal_while_it_samples(adder: Path, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """It ends as a signalled process does, and leaves no half of a line; the same command goes on."""
    run = tmp_path / "run"
    command = arguments(adder, run, VERIFIER, loop__rationalize="true")
    text = zygote.run(command, ("on_store_write", 5, "SIGTERM"), expect=143)
    assert "stopped; the same command goes on from here" in text and "Traceback" not in text
    stored = store_lines(run)
    assert len([line for line in stored if line["purpose"] == "sample"]) == 8  # a batch, and nothing of the next
    zygote.run(command)
    assert manifests(run) == manifests(whole) and store_lines(run)[: len(stored)] == stored


def test_a_full_disk_while_it_samples(adder: Path, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(adder, run, VERIFIER, loop__rationalize="true")
    text = zygote.run(command, ("full_disk_of_store", 5, 400), expect=2)
    assert f"error: {run / 'samples.jsonl'}: cannot write (File too large)" in text and "Traceback" not in text
    stored = (run / "samples.jsonl").read_bytes()
    assert stored.endswith(b"\n")
    zygote.run(command)
    assert manifests(run) == manifests(whole) and (run / "samples.jsonl").read_bytes().startswith(stored)


def test_the_problems_of_an_iteration() -> None:
    problems = sums().problems("train")
    chosen = [chosen_problems(problems, 10, sample_seed(0, iteration)) for iteration in range(1, 4)]
    assert len({tuple(one.id for one in part) for part in chosen}) == 3
    assert chosen_problems(problems, None, 0) == chosen_problems(problems, 1000, 0) == list(problems)
    assert [problems.index(one) for one in chosen[0]] == sorted(problems.index(one) for one in chosen[0])
