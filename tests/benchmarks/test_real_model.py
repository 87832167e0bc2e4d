"""The benchmark on a given model: what it measures, by plain code; what it says; and that it goes on where it was."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import real_model
from benchmarks.environment import ROOT
from benchmarks.real_model import CONTROLS, FIRST, GIVEN, LEAST_STEPS, PAUSE, PLAIN, RUNS, THINKING, UNREWARDED
from benchmarks.small_model import save_small_model
from quietstar import QuietStarForCausalLM
from quietstar.errors import ConfigError, QuietStarError, run_command
from quietstar.statistics.intervals import estimate
from quietstar.training.step_functions import EVALUATION_SEED
from tests.benchmarks.test_on_gpu import NOT_NEEDED
from tests.model.naive import NaiveThinker

pytestmark = pytest.mark.usefixtures("one_thread")

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
WORDS = ["the", "old", "house", "of", "stone", "1", "23", "stands"]
SMALL = [
    "--length",
    "24",
    "--batch-size",
    "2",
    "--thought-length",
    "2",
    "--lookahead",
    "2",
    "--threads",
    "1",
    "--held-out",
    "8",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and two files of texts."""
    folder, draw = tmp_path_factory.mktemp("real_model"), random.Random(0)
    save_small_model(folder / "model", [" ".join(WORDS)], 270, hidden_size=32, intermediate_size=48, layers=2)
    (folder / "book.txt").write_text(" ".join(draw.choices(WORDS, k=300)))
    rows = [{"question": " ".join(draw.choices(WORDS, k=9)), "answer": f"#### {number}"} for number in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(place: Path, out: Path, *more: str) -> list[str]:
    texts = [str(place / "book.txt"), f"{place / 'sums.jsonl'}:question+answer"]
    given = ["--model", str(place / "model"), "--texts", *texts, "--minutes", "5", "--device", "cpu", *SMALL]
    return [*given, "--output", str(out), "--results", str(out / "results"), *more]


def shorten(out: Path) -> None:
    """Makes the plan of a folder, whose times differ from run to run, the same few steps of all runs."""
    plan = json.loads((out / "plan.json").read_text())
    plan |= {"steps": {run.name: 6 if run.parts else 0 for run in RUNS}, "left out": {}}
    (out / "plan.json").write_text(json.dumps(plan))


@pytest.fixture(scope="module")
def planned(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where only the plan is made."""
    out = tmp_path_factory.mktemp("planned") / "runs"
    options = real_model.Experiment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "run", lambda self, write: None)
        patch.setattr(options, "rows", lambda self: [])
        real_model.main(words(place, out))
    shorten(out)
    return out


@pytest.fixture(scope="module")
def finished(place: Path, planned: Path) -> Path:
    out = planned.with_name("finished")
    shutil.copytree(planned, out)
    real_model.main(words(place, out))
    return out


def table(out: Path) -> list[dict[str, str]]:
    lines = (out / "results" / "real_model_cpu.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def records(out: Path) -> dict[str, dict[str, float]]:
    found = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines() if line]
    assert len({one["key"] for one in found}) == len(found), "a text is measured twice"
    return {one.pop("key"): one for one in found}


# ------------------------------------------------------------------------------------------------- what is measured


@pytest.fixture
def thinker(place: Path) -> Iterator[QuietStarForCausalLM]:
    """A model whose thoughts matter: START, END and the mixing head are far from where they begin."""
    torch.manual_seed(1)
    model = QuietStarForCausalLM.from_base(str(place / "model"), thought_length=3, lookahead=3, thoughts_per_position=2)
    with torch.no_grad():
        for parameter in [*model.thought_embedding.parameters(), *model.mixing_head.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.5)
        for layer in model.base.model.layers:
            layer.self_attn.v_proj.weight.mul_(8)
    yield model.double()


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_the_three_measures_against_each_stream_by_itself(thinker: QuietStarForCausalLM, at_once: int) -> None:
    torch.manual_seed(2)
    texts = torch.randint(3, 200, (5, 14))
    positions = torch.tensor([[0, 5, 12], [1, 2, 3], [4, 8, 12], [0, 6, 11], [2, 7, 10]], dtype=torch.int32)
    partner = [2, 3, 4, 0, 1]
    found = dict(real_model.measure(thinker, texts, positions, partner, at_once))
    thoughts = thinker.think(texts, anchors=positions, seed=EVALUATION_SEED)
    naive = NaiveThinker(thinker)
    sides = {}
    for name, order in (("own", range(5)), ("foreign", partner)):
        sides[name] = naive.step(texts, thoughts.tokens[list(order)], thoughts.anchor, 3, 2)
    assert sorted(found) == list(range(5))
    assert len({round(values["own"] - values["foreign"], 6) for values in found.values()} - {0.0}) == 5
    for text, values in found.items():
        targets = [(anchor, j) for anchor in positions[text].tolist() for j in range(3) if anchor + 1 + j < 14]
        logprobs = sides["own"].base_logits[text].log_softmax(-1)
        plain = [-float(logprobs[anchor + j, texts[text, anchor + 1 + j]]) for anchor, j in targets]
        assert values["targets"] == len(targets)
        assert values["without"] == pytest.approx(np.mean(plain), rel=1e-6)
        for name, step in sides.items():
            nll = step.talk_nll[text].view(3, 2, 3)
            theirs = [
                float(nll[place, k, j])
                for place in range(3)
                for k in range(2)
                for j in range(3)
                if (int(positions[text, place]), j) in targets
            ]
            assert values[name] == pytest.approx(np.mean(theirs), rel=1e-6)


@pytest.mark.parametrize("positions", [[[0, 1]], [[12, 13]], [[3, 11]], [[10, 12]], [[5, 6]]])
def test_without_thoughts_the_same_targets_have_the_same_nll(
    thinker: QuietStarForCausalLM, positions: list[list[int]]
) -> None:
    torch.manual_seed(3)
    texts, where = torch.randint(3, 200, (2, 14)), torch.tensor(positions * 2, dtype=torch.int32)
    with_thoughts = dict(real_model.measure(thinker, texts, where, [1, 0], 2))
    without = dict(real_model.measure(thinker, texts, where, [1, 0], 2, thinks=False))
    for text, values in without.items():
        assert set(values) == {"targets", "without"}
        assert values == pytest.approx({name: with_thoughts[text][name] for name in values}, rel=1e-6)


@pytest.mark.parametrize("counts", [[2], [3], [2, 2], [3, 2, 5], [7, 7], [20, 31, 2], [100]])
def test_no_text_keeps_its_own_thoughts(counts: list[int]) -> None:
    partner = real_model.partners(counts)
    file_of = np.repeat(np.arange(len(counts)), counts)
    assert sorted(partner) == list(range(sum(counts)))
    assert all(text != other and file_of[text] == file_of[other] for text, other in enumerate(partner))


def test_positions_are_where_the_given_model_is_least_sure(place: Path, planned: Path) -> None:
    """Positions that are chosen anew at each evaluation made the NLL without thought rise while that of the text fell:
    here they are the given model's, whatever is trained.
    """
    plain: Any = AutoModelForCausalLM.from_pretrained(place / "model")
    experiment = experiment_of(place, planned)
    with torch.no_grad():
        probabilities = plain(experiment.texts).logits[:, :-1].double().softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    expected = entropy.topk(round(0.25 * 23), dim=1).indices.sort(1).values
    assert torch.equal(experiment.positions.long(), expected)


# ----------------------------------------------------------------------------------------------------- what is said

T_QUANTILES = {2: 12.706205, 3: 4.302653, 10: 2.262157, 20: 2.093024, 30: 2.045230, 100: 1.984217}
"""Of Student's distribution with one degree of freedom less, from a table: 95 % between."""


@pytest.mark.parametrize("texts", list(T_QUANTILES))
def test_the_interval_is_students_over_texts(texts: int) -> None:
    random = np.random.default_rng(texts)
    own, foreign = random.normal(2, 0.5, (2, texts))
    records = [
        {"targets": 3, "without": 2.0, "own": one, "foreign": other, "mixing weight": 0.1}
        for one, other in zip(own.tolist(), foreign.tolist(), strict=True)
    ]
    row = real_model.row_of(THINKING, records)
    difference = foreign - own
    reach = T_QUANTILES[texts] * difference.std(ddof=1) / np.sqrt(texts)
    mean = difference.mean()
    assert row["own - foreign"] == f"{mean:+.4f} [{mean - reach:+.4f}, {mean + reach:+.4f}]"
    assert row["own thoughts"] == f"{own.mean():.4f}" and row["targets"] == 3 * texts


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.1, 0.2] * 10, "own thoughts better than foreign ones"),
        ([-0.1, -0.2] * 10, "own thoughts worse than foreign ones"),
        ([-0.1, 0.1] * 10, "no difference can be told"),
        ([-0.2, 0.3] * 10, "no difference can be told"),
        ([0.2, -0.3] * 10, "no difference can be told"),
        ([0.1, 0.2] * 9 + [0.1], "too little to tell: 19 texts, needs 20"),
        ([0.1], "too little to tell: 1 texts, needs 20"),
        ([-0.5] * 2, "too little to tell: 2 texts, needs 20"),
        ([0.0] * 40, "no difference can be told"),
    ],
)
def test_verdicts(gains: list[float], expected: str) -> None:
    assert real_model.verdict(estimate(gains), len(gains)) == expected


@pytest.mark.parametrize(
    ("minutes", "left_out"),
    [(100, []), (13.5, []), (10, [PAUSE]), (7, [UNREWARDED, PAUSE]), (6.9, list(CONTROLS)), (0.1, list(CONTROLS))],
)
def test_what_fits_into_the_minutes(minutes: float, left_out: list[real_model.Run]) -> None:
    seconds = {"language_modeling": 1.0, "quietstar": 6.0, "text": 2.0}
    found = real_model.divide(seconds, minutes, least=4, most=50)
    assert list(found["left out"]) == [run.name for run in left_out]
    trained = [run for run in RUNS if run.parts and run not in left_out]
    spent = {run.name: found["steps"][run.name] * seconds[run.method] for run in trained}
    measuring = found["texts"] * seconds["text"] * sum(run.measured != "no thoughts" for run in trained)
    if minutes > 1:
        assert sum(spent.values()) <= 40 * minutes
        assert measuring <= 20 * minutes
        assert spent[FIRST.name] == pytest.approx(spent[THINKING.name] / 3, abs=6)
    if PLAIN in trained:
        assert spent[PLAIN.name] == pytest.approx(spent[THINKING.name], abs=6), "not as long"
        assert found["steps"][THINKING.name] >= LEAST_STEPS
    assert 4 <= found["texts"] <= 50 and min(found["steps"][run.name] for run in trained) >= 1


def test_the_page_says_what_it_is(place: Path, finished: Path) -> None:
    text, rows = (finished / "results" / "real_model_cpu.md").read_text(), table(finished)
    assert [row["run"] for row in rows] == [run.name for run in RUNS]
    assert len({row["targets"] for row in rows}) == 1, "rows of different targets"
    found = records(finished)
    for row in rows:
        own = [values for key, values in found.items() if key.startswith(f"{row['run']}/")]
        assert row["texts"] == str(len(own)) and len(own) >= 4
        assert row["no thought"] == f"{np.mean([values['without'] for values in own]):.4f}"
        assert all(f" {row[name]} " in text for name in ("run", "no thought", "own - foreign"))
    by_name = {row["run"]: row for row in rows}
    assert by_name[PLAIN.name]["own thoughts"] == by_name[PAUSE.name]["own - foreign"] == "-"
    assert "**A short run**, Quiet-STaR had 6 steps of 2 texts" in text and f"**{rows[2]['verdict']}**" in text
    pairs = [found[f"{PLAIN.name}/{n}"]["without"] - found[f"{THINKING.name}/{n}"]["own"] for n in range(len(own))]
    assert f"own thoughts: {np.mean(pairs):+.4f} [" in text
    assert "command: `python benchmarks/real_model.py" in text and str(place) not in text and "- cpu: `" in text


# --------------------------------------------------------------------------------------------------------- going on


def experiment_of(place: Path, out: Path) -> real_model.Experiment:
    """The experiment of a folder, as the command makes it."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_model.Experiment, "run", lambda self, write: found.append(self))
        patch.setattr(real_model.Experiment, "rows", lambda self: [])
        real_model.main(words(place, out, "--results", str(out / "unused")))
    return found[0]


def test_runs_begin_with_the_weights_of_the_first(place: Path, finished: Path) -> None:
    experiment = experiment_of(place, finished)
    first = experiment.trained(FIRST).state_dict()
    given = experiment.model(GIVEN).state_dict()
    assert any(not torch.equal(first[name], given[name]) for name in given)
    for run in (THINKING, *CONTROLS):
        begin = experiment.model(run)
        assert all(torch.equal(value, first[name]) for name, value in begin.state_dict().items())
        assert (begin.config.thinking == "pause") == (run is PAUSE)
        assert (experiment.configuration(run).objective.policy_weight == 0) == (run is UNREWARDED)
        assert experiment.configuration(run).training.method == run.method


class Killed(BaseException):
    """The process has ended here."""


@pytest.mark.parametrize("texts", [0, 3, 8, 13, 20])
def test_an_experiment_that_ends_while_it_measures_goes_on(
    place: Path, planned: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: int
) -> None:
    out, add, left = tmp_path / "runs", real_model.ItemStore.add, [texts]
    shutil.copytree(planned, out)

    def dying(self: real_model.ItemStore, key: str, record: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        add(self, key, record)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(real_model.ItemStore, "add", dying)
        real_model.main(words(place, out))
    assert len(records(out)) == texts
    real_model.main(words(place, out))
    assert table(out) == table(finished) and records(out) == records(finished)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["language-modelling-first", "quiet-star", "no-reinforce"])
def test_a_killed_command_goes_on(place: Path, planned: Path, finished: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "runs"
    shutil.copytree(planned, out)
    command = [sys.executable, real_model.__file__, *words(place, out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out / moment / "metrics.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    real_model.main(words(place, out))
    assert table(out) == table(finished) and records(out) == records(finished)


def test_a_control_that_would_be_late_is_left_out(place: Path, planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    shutil.copytree(planned, out)
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps(plan | {"spent": 60 * 5 * 1.2}))
    real_model.main(words(place, out))
    assert [row["run"] for row in table(out)] == [GIVEN.name, FIRST.name, THINKING.name]
    text = (out / "results" / "real_model_cpu.md").read_text()
    assert text.count("(what came before it took longer than planned)") == len(CONTROLS)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model", "missing"], "--model: missing is not a directory"),
        (["--model", "./missing"], "--model: ./missing is not a directory"),
        (["--model", "bare"], "bare has no tokenizer"),
        (["--model", "empty.txt"], "--model: empty.txt is not a directory"),
        (["--texts", "missing.txt"], "missing.txt"),
        (["--texts", "empty.txt"], "empty.txt"),
        (["--texts", "few.txt"], "--texts few.txt: 3 texts of 24 tokens; needs 10"),
        (["--texts", "{place}/book.txt", "few.txt"], "--texts few.txt: 3 texts of 24 tokens; needs 10"),
        (["--texts", "{place}/sums.jsonl"], "text"),
        (["--texts", "{place}/sums.jsonl:question+reply"], "reply"),
        (["--texts", "{place}/book.txt", "--length", "5000"], "needs at least 5000 for one training text"),
        (["--minutes", "0"], "--minutes: got 0.0, needs a finite number above 0"),
        (["--minutes", "-3"], "--minutes: got -3.0, needs a finite number above 0"),
        (["--minutes", "nan"], "--minutes: got nan, needs a finite number above 0"),
        (["--minutes", "inf"], "--minutes: got inf, needs a finite number above 0"),
        (["--learning-rate", "0"], "--learning-rate: got 0.0, needs a finite number above 0"),
        (["--held-out", "0"], "--held-out: got 0, needs"),
        (["--batch-size", "0"], "training.batch_size: got 0"),
        (["--thought-length", "30"], "data.length: got 24, needs at least model.thought_length"),
        (["--thoughts-per-position", "1"], "model.thoughts_per_position: got 1, needs at least 2"),
        (["--positions", "most"], "model.positions: got 'most'"),
        (["--seed", "-1"], "--seed: got -1"),
        pytest.param(["--device", "cuda"], "--device: ", marks=NO_GPU),
    ],
)
def test_bad_input_is_one_line(
    changed: list[str],
    message: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "few.txt").write_text("the old house " * 12)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    arguments = words(place, tmp_path / "out", *[word.format(place=place) for word in changed])
    assert run_command(lambda: real_model.main(arguments)) == 2
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and lines[-1] == errors[0], lines


@pytest.mark.parametrize(
    "changed",
    [["--length", "20"], ["--minutes", "3"], ["--seed", "1"], ["--learning-rate", "1e-4"], ["--positions", "every:3"]],
)
def test_a_folder_of_another_experiment_is_refused(place: Path, planned: Path, changed: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"has another run: .* was .* and is .*; choose another folder"):
        real_model.main(words(place, planned, *changed))


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"steps": {}}', "null", "\x00"])
def test_a_damaged_plan_is_named(place: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match=r"--output: .*plan.json is damaged; delete it, or choose another folder"):
        real_model.main(words(place, tmp_path))


def test_changed_texts_are_another_experiment(place: Path, planned: Path, tmp_path: Path) -> None:
    other = tmp_path / "place"
    shutil.copytree(place, other)
    with (other / "sums.jsonl").open("a") as file:
        file.write('{"question": "the old house of stone stands of the old house", "answer": "23"}\n' * 8)
    shutil.copytree(planned, tmp_path / "runs")
    plan = json.loads((tmp_path / "runs" / "plan.json").read_text())
    plan["identity"] |= {
        name: value.replace(str(place), str(other))
        for name, value in plan["identity"].items()
        if isinstance(value, str)
    }
    (tmp_path / "runs" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(QuietStarError, match=r"has another run: sha256 was"):
        real_model.main(words(other, tmp_path / "runs"))


def test_it_runs_where_only_torch_and_transformers_are(place: Path, tmp_path: Path) -> None:
    """A lent machine has no jsonargparse, which the command line of the package needs."""
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({[*NOT_NEEDED, 'scipy', 'tensorboard', 'pyarrow']}))\n"
        f"from benchmarks import real_model\nreal_model.main({words(place, tmp_path / 'runs', '--minutes', '0.02')})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert len(table(tmp_path / "runs")) >= 3
