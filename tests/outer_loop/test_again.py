"""A second command in a run's directory: what it finds, what it mends, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar import star
from quietstar.outer_loop import star as loop
from quietstar.runs.files import RunLock
from tests.faults.launch import Zygote
from tests.outer_loop.loops import VERIFIER, arguments, judged, kept, manifests, outputs, store_lines


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


@pytest.mark.slow
def test_a_signal_while_it_samples(adder: Path, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """It ends as a signalled process does, and leaves no half of a line; the same command goes on."""
    run = tmp_path / "run"
    command = arguments(adder, run, VERIFIER, loop__rationalize="true")
    text = zygote.run(command, ("on_store_write", 5, "SIGTERM"), expect=143)
    assert "stopped; the same command continues from here" in text and "Traceback" not in text
    stored = store_lines(run)
    assert len([line for line in stored if line["purpose"] == "sample"]) == 8  # a batch, and nothing of the next
    zygote.run(command)
    assert manifests(run) == manifests(whole) and store_lines(run)[: len(stored)] == stored


@pytest.mark.slow
def test_a_full_disk_while_it_samples(adder: Path, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(adder, run, VERIFIER, loop__rationalize="true")
    text = zygote.run(command, ("full_disk_of_store", 5, 400), expect=2)
    assert f"error: {run / 'samples.jsonl'}: cannot write (File too large)" in text and "Traceback" not in text
    stored = (run / "samples.jsonl").read_bytes()
    assert stored.endswith(b"\n")
    zygote.run(command)
    assert manifests(run) == manifests(whole) and (run / "samples.jsonl").read_bytes().startswith(stored)


def zeroed(file: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def without_a_tensor(file: Path) -> None:
    save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})


DAMAGES = (zeroed, one_bit, truncated, emptied, without_a_tensor, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_sampled_from_changed_weights(
    damage: Any, adder: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recorded hash of an iteration's weights was not looked at: changed weights gave other numbers, and exit 0.

    Restored from its base the iteration is the same again, and no sample of before is lost.
    """
    run = copied(plain, tmp_path)
    before = manifests(run)
    model = run / "iteration-01/model"
    damage(model / "model.safetensors")
    (run / "iteration-02/sample.json").unlink()
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    again = [(line.get("iteration"), line.get("purpose")) == (2, "sample") for line in map(json.loads, lines)]
    (run / "samples.jsonl").write_text("".join(line for line, gone in zip(lines, again, strict=True) if not gone))
    store = store_lines(run)
    command = arguments(adder, run, loop__iterations=2)
    found = error_of(capsys, command)
    assert str(model) in found and "put back what was there, or delete" in found and "iteration-01/train.json" in found
    assert store_lines(run) == store
    (run / "iteration-01/train.json").unlink()
    assert star.main(command) == 0 and manifests(run) == before


def test_weights_are_read_once_to_be_checked(
    adder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(plain, tmp_path)
    header = (run / "samples.jsonl").read_text().splitlines(keepends=True)[0]
    for name in manifests(run):
        if "sample" in name or "evaluate" in name:
            (run / name).unlink()
    (run / "samples.jsonl").write_text(header)
    hashed = []
    own = loop.weights_sha256
    monkeypatch.setattr(loop, "weights_sha256", lambda model: hashed.append(1) or own(model))
    assert star.main(arguments(adder, run, loop__iterations=2)) == 0
    assert len(hashed) == 3  # the base, and the models of two iterations, for five sets of samples


def test_nothing_is_deleted_that_the_run_has_not_made(adder: Path, plain: Path, tmp_path: Path) -> None:
    """An iteration is trained again, and the models before the last one are not kept."""
    run, elsewhere = copied(plain, tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine = ["mine.txt", "iteration-01/mine.txt", "iteration-01/mine/model/mine.txt", "iteration-07/mine.txt"]
    mine += ["base/mine.txt", "step-00000001/mine.txt", "iteration-01/model.old/mine.txt", "../elsewhere/mine.txt"]
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("precious")
    (run / "iteration-01/link").symlink_to(elsewhere)
    (run / "iteration-01/run").mkdir(exist_ok=True)
    (run / "iteration-01/run/link").symlink_to(elsewhere)
    (run / "iteration-01/model/link").symlink_to(elsewhere)
    (run / "iteration-01/train.json").unlink()
    options = {"loop__iterations": 2, "loop__keep_models": "last", "loop__redo": "true"}
    assert star.main(arguments(adder, run, **options)) == 0
    assert not (run / "iteration-01/model").exists()
    assert [(run / name).read_text() for name in mine] == ["precious"] * len(mine)
