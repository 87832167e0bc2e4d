"""Comparisons for real, on tiny models: what each run does, and the numbers that stand side by side."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quietstar import compare, star
from quietstar.model.loading import load_causal_lm, weights_sha256
from quietstar.reporting.comparison_report import write_comparison
from tests.outer_loop.few_sums import SUMS, TASK
from tests.outer_loop.loops import TEST, TRAIN, VERIFIER, arguments, outputs, rows, store_lines
from tests.outer_loop.recomputed import accuracy, by_problem, is_right, lines_of, mean_of_subsets

pytestmark = pytest.mark.slow

ARMS, BUDGET, CANDIDATES = ("star-paper", "rft", "vstar"), 5, 3


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `printed` compares two iterations of each preset."""
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module", autouse=True)
def printed(adder: Path, out: Path) -> str:
    """What the command prints. STaR's preset is greedy, the others share out the budget."""
    changes: dict[str, Any] = {"task": TASK, "loop__iterations": 2, "model__dtype": "float32"}
    changes |= {"sampling__samples": None, "sampling__temperature": None, "evaluation__candidates": CANDIDATES}
    options = arguments(adder, out, VERIFIER, **changes)
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text):
        patch.setenv("COLUMNS", "10000")
        assert compare.main(["--presets", ",".join(ARMS), "--budget", str(BUDGET), *options]) == 0
    return text.getvalue()


def comparison(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "comparison.json").read_text())
    return found


def points(run: Path, iterations: int = 2) -> list[tuple[int, float, int, float]]:
    """(iteration, completions of each training problem so far, steps so far, held-out accuracy), from the run's store
    and the logs of its trainings."""
    found, budget, steps = [], 0.0, 0
    for iteration in range(iterations + 1):
        if iteration:
            made = [line for purpose in ("sample", "rationalize") for line in lines_of(run, iteration, purpose)]
            budget += len(made) / len(by_problem(lines_of(run, iteration, "sample")))
        log = run / f"iteration-{iteration:02d}/train/metrics.jsonl"
        steps += rows(log)[-1]["step"] if log.exists() else 0
        found.append((iteration, budget, steps, accuracy(lines_of(run, iteration, "evaluate"))))
    return found


def of_points(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("iteration", "budget", "steps", "accuracy")
    return [tuple(pytest.approx(point[name]) for name in names) for point in found]


def test_each_preset_has_sampled_its_share_of_the_budget(out: Path) -> None:
    """All from one base, the greedy one once, and no more than the budget in all."""
    for name, samples in (("star-paper", 1), ("rft", BUDGET // 2), ("vstar", BUDGET // 2)):
        for iteration in (1, 2):
            found = by_problem(lines_of(out / name, iteration, "sample"))
            assert len(found) == TRAIN and set(found) < set(SUMS["train"])
            assert {len(own) for own in found.values()} == {samples}
            assert {len(own) for own in by_problem(lines_of(out / name, iteration, "rationalize")).values()} <= {
                samples
            }
        assert outputs(out / name, 0, "base") == outputs(out / ARMS[0], 0, "base")
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        assert (config["preset"], config["output_dir"]) == (name, str(out / name))
        assert config["sampling"]["samples"] == samples
    assert lines_of(out / "star-paper", 1, "rationalize") and not lines_of(out / "rft", 1, "rationalize")
    assert [(out / name / "verifiers").is_dir() for name in ARMS] == [False, False, True]


def test_the_numbers_are_those_of_each_runs_own_files(out: Path) -> None:
    found = comparison(out)
    assert found["directories"] == {name: name for name in ARMS} and list(found["arms"]) == list(ARMS)
    for name, arm in found["arms"].items():
        assert arm["task"] == "addition" and points(out / name) == of_points(arm["points"])
        assert all(point["problems"] == TEST for point in arm["points"])
        problems = by_problem(lines_of(out / name, 2, "candidates")).values()
        for row in arm["candidates"]["rows"]:
            if row["measure"] == "pass":
                shares = [
                    mean_of_subsets(CANDIDATES, row["k"], lambda subset, own=own: any(is_right(own[i]) for i in subset))
                    for own in problems
                ]
                assert row["value"]["mean"] == pytest.approx(sum(shares) / len(shares))
        assert (arm["candidates"]["compared"] is None) == (name != "vstar")


@pytest.mark.parametrize("asked", [BUDGET, None, 2.5])
def test_at_an_equal_budget_each_run_is_taken_at_its_last_iteration_within_it(
    out: Path, asked: float | None, tmp_path: Path
) -> None:
    """The largest that all have is that of the run that has sampled least."""
    if asked != BUDGET:  # that one the command has written
        write_comparison(tmp_path, {name: out / name for name in ARMS}, asked)
    found = comparison(out if asked == BUDGET else tmp_path)["equal_budget"]
    limit = min(points(out / name)[-1][1] for name in ARMS) if asked is None else asked
    assert found["budget"] == pytest.approx(limit) and found["asked"] == (asked is not None)
    for name in ARMS:
        last = max(point for point in points(out / name) if point[1] <= limit + 1e-9)
        assert [last] == of_points([found["arms"][name]])
    taken = {point["iteration"] for point in found["arms"].values()}
    assert taken == {2} if asked == BUDGET else 1 in taken


def test_the_command_prints_what_it_has_written(printed: str, out: Path) -> None:
    assert printed.endswith(f"report: {out / 'report.html'}\n") and (out / "report.html").is_file()
    table = printed.split("\n\n")[0].splitlines()
    for name, line in zip(ARMS, table[-len(ARMS) :], strict=True):
        _, _, steps, right = points(out / name)[-1]
        cells = re.split(r"\s{2,}", line.strip())
        assert cells[:2] == [name, "2"] and cells[2].startswith(f"{100 * right:.1f} ") and cells[3] == str(steps)


def test_the_embedded_default_runs_its_controls_from_one_base(tmp_path: Path) -> None:
    """Rationalisation, none, and answers alone, trained on for as long as the last iteration is."""
    changes = {
        "characters.layers": 1,
        "characters.hidden_size": 32,
        "characters.context": 32,
        "characters.steps": 150,
        "characters.learning_rate": 1e-2,
    }
    changes |= {
        "characters.row_length": 48,
        "loop.iterations": 2,
        "loop.demonstrations": "false",
        "sampling.samples": 8,
    }
    command = arguments(tmp_path, tmp_path / "run", changes, model__path=None)  # the preset makes a model
    assert star.main([*command, "--preset", "addition"]) == 0
    out = tmp_path / "run"
    base = weights_sha256(load_causal_lm(out / "base/model", torch.float32))
    arms = {"with rationalisation": 2, "without rationalisation": 2, "answers alone": 0}
    found = comparison(out)
    assert found["directories"] == {name: name.replace(" ", "-") for name in arms} and list(found["arms"]) == list(arms)
    for name, iterations in arms.items():
        run = out / name.replace(" ", "-")
        assert outputs(run, 0, "base")["model_sha256"] == base
        assert points(run, iterations) == of_points(found["arms"][name]["points"]) if iterations else True
        purposes = {line["purpose"] for line in store_lines(run)}
        hinted = {"rationalize"} if name.startswith("with ") else set()
        assert purposes == {"evaluate", *(("sample", *hinted) if iterations else ())}
    alone = out / "answers-alone"
    (point,) = found["arms"]["answers alone"]["points"]
    right = [line["text"] == f"{sum(map(int, line['problem'].split('+')))}." for line in lines_of(alone, 0, "evaluate")]
    assert (point["budget"], point["accuracy"]) == (0, sum(right) / TEST)
    assert point["steps"] == rows(alone / "iteration-00/train/metrics.jsonl")[-1]["step"] == 4 + 1
    assert outputs(alone, 0, "train")["base_sha256"] == base
    assert found["arms"]["answers alone"]["task"] == "addition-direct"
