"""Sweeps through their command: which arms run, what is written, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from quietstar.config.command_line import parse_config
from quietstar.demos import textbook as experiment
from quietstar.demos.options import GRID, SWEEP, Sweep, make_sweep
from quietstar.demos.sweep import write_sweep_report
from quietstar.errors import ConfigError
from quietstar.statistics.intervals import student_t_quantile
from quietstar.sweep import main

TINY = [
    *("--textbook.seeds", "1", "--textbook.pretraining_steps", "2", "--training.steps", "2"),
    *("--training.batch_size", "2", "--training.eval_every", "0", "--training.threads", "1"),
]


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures on 4 texts, for tests that do not look at the numbers."""
    monkeypatch.setattr(experiment, "HELD_OUT_TEXTS", 4)


def sweep_of(vary: list[str], *words: str) -> Sweep:
    return make_sweep(parse_config(SWEEP, [*words, *(["--vary", *vary] if vary else [])]))


def arms(vary: list[str], *words: str) -> dict[str, dict[str, str]]:
    """The name of each arm, by option and value."""
    sweep = sweep_of(vary, *words)
    return {ablation.key: {text: arm.name for text, arm in ablation.arms.items()} for ablation in sweep.ablations}


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a wrong input."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").rstrip("\n")


class TestVariations:
    def test_the_grid_varies_each_option_around_the_default(self) -> None:
        sweep = sweep_of([])
        assert [ablation.key for ablation in sweep.ablations] == list(GRID)
        assert len(sweep.arms()) == 1 + sum(len(ablation.arms) - 1 for ablation in sweep.ablations) == 13
        for ablation in sweep.ablations:
            assert list(ablation.arms) == [text.removesuffix(".0") for text in GRID[ablation.key].split(",")]
            assert [arm for arm in ablation.arms.values() if arm is sweep.default]

    def test_names_and_values(self) -> None:
        assert arms(["lookahead,model.temperature", "learning_rate=1e-3,5e-4,0.001"]) == {
            "model.lookahead": {"1": "default", "2": "model.lookahead=2", "3": "model.lookahead=3"},
            "model.temperature": {"0.7": "model.temperature=0.7", "1": "default", "1.4": "model.temperature=1.4"},
            "training.learning_rate": {"0.0005": "default", "0.001": "training.learning_rate=0.001"},
        }

    def test_the_default_is_that_of_the_other_arguments(self) -> None:
        assert arms(["lookahead"], "--model.lookahead", "3")["model.lookahead"] == {
            "1": "model.lookahead=1",
            "2": "model.lookahead=2",
            "3": "default",
        }

    def test_null_is_the_value_of_the_objectives_preset(self) -> None:
        assert arms(["baseline"])["objective.baseline"]["leave_one_out"] == "default"
        assert arms(["baseline"], "--objective.preset", "authors")["objective.baseline"]["mean"] == "default"

    def test_a_value_that_names_no_directory_is_written_so_that_it_does(self) -> None:
        assert arms(["start_text=a/b"])["model.start_text"]["a/b"] == "model.start_text=a%2Fb"

    def test_other_arguments_hold_for_every_arm(self) -> None:
        sweep = sweep_of(["positions"], "--training.steps", "7")
        assert {arm.config.training.steps for arm in sweep.arms()} == {7}
        assert [arm.config.model.positions for arm in sweep.arms()] == ["all", "every:2", "entropy:0.5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary"], "vary: got no value, needs one: --vary VALUE"),
        (["--vary", "lookahed"], "vary: unknown option 'lookahed'; did you mean model.lookahead?"),
        (["--vary", "modle.lookahead=2"], "vary: unknown option 'modle.lookahead'; did you mean model.lookahead?"),
        (["--vary", "qqq"], "vary: unknown option 'qqq'; --help lists every option"),
        (["--vary", "lookahead,"], "vary: unknown option ''; --help lists every option"),
        (["--vary", "path=a"], "vary: path could be model.path or data.path, needs one of them"),
        (["--vary", "steps"], "vary: training.steps: got no values, needs some: training.steps=VALUE,VALUE"),
        (
            ["--vary", "lookahead", "model.lookahead=2"],
            "vary: model.lookahead is given twice, needs all its values in one place: model.lookahead=VALUE,VALUE",
        ),
        (["--vary", "lookahead=2,,3"], "vary: model.lookahead: got '2,,3', needs values separated by single commas"),
        (["--vary", "lookahead=2,x"], "vary: model.lookahead=x: model.lookahead: got 'x', needs a whole number"),
        (["--vary=lookahead=0"], "vary: model.lookahead=0: model.lookahead: got 0, needs at least 1"),
        (["--vary", "lookahead=1"], "vary: model.lookahead: got 1, needs a value besides the default's 1"),
        (["--vary", "training.seed=1,2"], "vary: training.seed: no measure of the embedded default depends on it"),
        (["--vary", "threads=1,2"], "vary: training.threads: no measure of the embedded default depends on it"),
        (["--vary", "output_dir=a"], "vary: output_dir: no measure of the embedded default depends on it"),
        (["--lookahead", "2"], "unknown option --lookahead; did you mean --model.lookahead?"),
        (
            ["--model.path", "m", "--data.path", "d"],
            "preset: got plain, but a sweep varies the embedded default; leave out preset, model.path and data.path",
        ),
    ],
)
def test_bad_arguments(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(words, capsys) == message
    assert not list(tmp_path.iterdir())


def test_help_and_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "`NAME,NAME`" in shown and "--training.learning_rate" in shown
    assert all(f"  {key:28}{values}" in shown for key, values in GRID.items())

    def printed(*words: str) -> tuple[str, int]:
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--print_config"])
        file = tmp_path / "printed.yaml"
        file.write_text(capsys.readouterr().out)
        config = parse_config(SWEEP, ["--config", str(file)])
        return config.output_dir, config.textbook.seeds

    assert printed() == ("runs/sweep", 3)
    assert printed("--textbook.seeds=1", "--output_dir", "here") == ("here", 1)
    file = tmp_path / "given.yaml"
    file.write_text("textbook: {seeds: 5}\n")
    assert printed("--config", str(file)) == ("runs/sweep", 5)


def test_intervals_and_differences_of_two_seeds(tmp_path: Path) -> None:
    """NLLs 0.1 and 0.3 of the default, 0.2 and 0.5 of the arm: the differences 0.1 and 0.2 come from within a seed."""
    sweep = sweep_of(["lookahead=2"])
    results = {
        seed: {
            name: {"nll_talk": nll, "accuracy_talk": 0.5, "correct_workings": 1.0, "seconds": 2.0}
            for name, nll in (("default", default), ("model.lookahead=2", arm))
        }
        for seed, default, arm in ((0, 0.1, 0.2), (1, 0.3, 0.5))
    }
    table = write_sweep_report(sweep, results, tmp_path)
    assert student_t_quantile(0.95, 1) == pytest.approx(12.706205)
    # mean 0.2 and standard error 0.1; mean 0.35 and 0.15; mean 0.15 and 0.05; times 12.7062
    assert "| the default | 0.200 ± 0.100 [-1.071, 1.471] | 0.500 ± 0.000 [0.500, 0.500] | 1.000" in table
    assert "| `2` (default: `1`) | 0.350 ± 0.150 [-1.556, 2.256] |" in table
    assert "| 0.150 ± 0.050 [-0.485, 0.785] | 2 |" in table
    arm = json.loads((tmp_path / "results.json").read_text())["arms"]["model.lookahead=2"]
    assert arm["nll_talk"]["high"] == pytest.approx(0.35 + 0.15 * 12.706205)
    figure = ElementTree.parse(tmp_path / "sweep.svg").getroot()
    names = [title.text for title in figure.iter("{http://www.w3.org/2000/svg}title")]
    assert names == ["1: 0.2 (0.1, 0.3)", "2: 0.35 (0.2, 0.5)"]
    means = [path.get("d") for path in figure.iter() if path.get("class", "").startswith("dots f")][-2:]
    (default, arm), (low, high) = (float(d.split()[1].partition("m")[0]) for d in means), (0.2, 0.35)
    levels = [(d.get("d"), d.get("class")) for d in figure.iter() if d.get("class") == "mark"]
    chance = float(levels[0][0].split()[1].partition("h")[0])
    # a logarithmic axis: ln 7 is as far above 0.35 as their ratio says
    assert (default - arm) / (arm - chance) == pytest.approx(
        math.log(high / low) / math.log(math.log(7) / high), rel=0.02
    )


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_a_sweep_writes_its_report_and_is_continued_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output_dir", str(tmp_path), *TINY]
    assert main([*words, "--vary", "positions=all,every:2"]) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "results.md").read_text()
    assert "| `model.positions` | `every:2` (default: `all`) |" in printed and "![Answer NLL" in table
    assert "- command: `" in table and "- torch: `" in table and "- cpu: `" in table
    seed = tmp_path / "seed-0"
    found = {file.parent.name: file.stat().st_mtime_ns for file in seed.glob("*/measures.json")}
    assert set(found) == {"default", "model.positions=every:2"}
    assert not list(seed.glob("*/base"))  # one character model for both
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["default"]["seeds"]["0"]["nll_talk"] == results["arms"]["default"]["nll_talk"]["mean"]

    # another textbook needs another character model; what is finished stays
    assert main([*words, "--vary", "useful_asides=0.5", "--vary", "positions=every:2"]) == 0
    assert (seed / "textbook.useful_asides=0.5" / "base" / "config.json").is_file()
    again = {file.parent.name: file.stat().st_mtime_ns for file in seed.glob("*/measures.json")}
    assert {name: again[name] for name in found} == found
    assert set(json.loads((tmp_path / "results.json").read_text())["options"]) == {
        "textbook.useful_asides",
        "model.positions",
    }

    capsys.readouterr()
    message = error_of([*words, "--vary", "positions=every:2", "--training.steps", "3"], capsys)
    assert f"{seed / 'default'}: was made with other options: training.steps was 2 and is 3." in message
    changed = ["--training.steps", "1", "--training.resume", "false"]
    assert main([*words, *changed, "--vary", "positions=every:2"]) == 0
    options = json.loads((seed / "default" / "measures.json").read_text())["options"]
    assert options["training.steps"] == 1


STOPPED_TWICE = """
import os, signal, sys
from quietstar.sweep import main
from quietstar.demos import textbook as experiment

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
experiment.HELD_OUT_TEXTS = 4
write = experiment.write_finished
for name, number in (("default", signal.SIGKILL), ("model.lookahead=2", signal.SIGINT)):
    process = os.fork()  # of a process that has imported everything, once for both
    if process == 0:
        def write_and_stop(file, *rest, name=name, number=number):
            write(file, *rest)
            if file.parent.name == name:
                os.kill(os.getpid(), number)  # from outside it could come too late

        experiment.write_finished = write_and_stop
        sys.exit(main(sys.argv[1:]))
    print("status", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_a_sweep_that_is_killed_or_interrupted_keeps_what_is_finished(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), *TINY, "--vary", "lookahead"]
    seed = tmp_path / "seed-0"
    run = subprocess.run(
        [sys.executable, "-c", STOPPED_TWICE, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    statuses = [line for line in run.stdout.splitlines() if line.startswith("status")]
    assert statuses == [f"status {-signal.SIGKILL}", "status 130"], run.stderr
    assert "Traceback" not in run.stderr
    finished = {file: file.stat().st_mtime_ns for file in seed.glob("*/measures.json")}
    assert {file.parent.name for file in finished} == {"default", "model.lookahead=2"}
    assert not (tmp_path / "results.md").exists()

    assert main(words) == 0
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert set(json.loads((tmp_path / "results.json").read_text())["arms"]) == {
        "default",
        "model.lookahead=2",
        "model.lookahead=3",
    }


def test_arguments_that_make_a_value_impossible_are_told_before_anything_runs(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--model.thoughts_per_position", "1", "--objective.baseline", "none"]
    wanted = "^vary: objective.baseline=leave_one_out: model.thoughts_per_position: got 1, needs at least 2"
    with pytest.raises(ConfigError, match=wanted):
        sweep_of([], *words)
