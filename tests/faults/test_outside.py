"""Nothing outside the run's own checkpoints is read, followed, deleted or executed."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Runs, assert_same_end, newest, state, steps


def test_the_newest_and_the_best_stay(runs: Runs, tmp_path: Path) -> None:
    """At this learning rate the loss grows, so that the best one is an early one."""
    options = {"training__keep_best": "true", "training__keep_checkpoints": 1, "training__eval_every": 2}
    options |= {"training__learning_rate": 0.3, "training__warmup_steps": 8, "training__steps": 6}
    runs.run(tmp_path, data__validation_fraction=0.2, **options)
    best = state(newest(tmp_path))["best"]["step"]
    assert steps(tmp_path) == [best, 6] and best == 2


@pytest.mark.filterwarnings("ignore:.*is a link")  # so the tests' own listing finds, too
def test_what_is_not_ours_stays(runs: Runs, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(newest(runs.whole()), elsewhere / "step-00000007")
    (run / "checkpoints" / "mine").mkdir(parents=True)
    (run / "checkpoints" / "mine" / "notes.txt").write_text("precious")
    (run / "checkpoints" / "step-3").mkdir()
    (run / "checkpoints" / "step-00000001").symlink_to(elsewhere)
    (run / "checkpoints" / "step-00000007").symlink_to(elsewhere / "step-00000007")
    (run / "checkpoints" / "step-00000001.new-1").symlink_to(elsewhere)
    (run / "checkpoints" / "step-00000001.old-1").write_text("precious")
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    runs.run(run)
    assert steps(run) == [6, 8]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (newest(run) / file).read_bytes() == (newest(runs.whole()) / file).read_bytes()
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"mine", "step-3", "step-00000001", "step-00000007"} <= names
    assert (run / "checkpoints" / "mine" / "notes.txt").read_text() == "precious"


def test_checkpoints_that_lie_elsewhere_are_refused(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    other = runs.stopped_after(4, tmp_path / "other")
    run.mkdir()
    (run / "checkpoints").symlink_to(other / "checkpoints")
    before = steps(other)
    assert f"{run / 'checkpoints'}: is a link" in runs.run(run, expect=2)
    assert steps(other) == before


def _describe(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("outside", ["../../../elsewhere/model.safetensors", "/absolute"])
def test_an_index_cannot_name_a_file_outside(runs: Runs, tmp_path: Path, outside: str) -> None:
    """Not even one whose manifest is right."""
    run = runs.stopped_after(1, tmp_path / "run")
    checkpoint = newest(run)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(checkpoint / "model.safetensors", tmp_path / "elsewhere")
    name = str(tmp_path / "elsewhere" / "model.safetensors") if outside == "/absolute" else outside
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"base.lm_head.weight": name}}))
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    del manifest["files"]["model.safetensors"]
    manifest["files"][index.name] = _describe(index)
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    text = runs.run(run, expect=2)
    assert f"{index}: weight_map: 'base.lm_head.weight': got '{name}', needs the name of a .safetensors file" in text


def test_a_manifest_cannot_name_a_file_outside(runs: Runs, tmp_path: Path) -> None:
    run = runs.stopped_after(1, tmp_path / "run")
    shutil.copy(runs.inputs / "text.jsonl", tmp_path / "text.jsonl")
    manifest = json.loads((newest(run) / "MANIFEST.json").read_text())
    manifest["files"]["../../../text.jsonl"] = _describe(tmp_path / "text.jsonl")
    (newest(run) / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "../../../text.jsonl" in runs.run(run, expect=2)


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


@pytest.fixture
def evil_model(runs: Runs, tmp_path: Path) -> tuple[Path, Path]:
    """A model directory with code wherever code could be, and the file that it makes."""
    model, marker = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(runs.inputs / "model", model)
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for name in ("modeling_own.py", "tokenization_own.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    for file, entries in (
        ("config.json", {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.T", "tokenization_own.T"]}),
    ):
        (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), "auto_map": entries}))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (model / name).write_bytes(pickle.dumps(Touch(marker)))
    return model, marker


def test_code_and_pickles_in_a_model_directory_never_run(
    runs: Runs, tmp_path: Path, evil_model: tuple[Path, Path]
) -> None:
    model, marker = evil_model
    pickle.loads((model / "optimizer.pt").read_bytes())
    assert marker.exists()  # the trap works
    marker.unlink()
    runs.run(tmp_path / "run", model__path=model)
    assert not marker.exists()
    saved = {path.name for path in newest(tmp_path / "run").rglob("*")}
    assert not {name for name in saved if name.endswith((".py", ".bin", ".pt"))}


def test_a_model_of_pickles_alone_is_refused(runs: Runs, tmp_path: Path, evil_model: tuple[Path, Path]) -> None:
    model, marker = evil_model
    (model / "model.safetensors").unlink()
    text = runs.run(tmp_path / "run", expect=2, model__path=model)
    assert f"{model} has its weights in pytorch_model.bin, which is not read" in text and "Traceback" not in text
    assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "rng_state.pth", "modeling_own.py"])
def test_a_pickle_in_a_checkpoint_is_neither_loaded_nor_passed_over_in_silence(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    run, marker = runs.stopped_after(2, tmp_path / "run"), tmp_path / "executed"
    (newest(run) / name).write_bytes(pickle.dumps(Touch(marker)))
    assert f"{name} does not belong to it" in runs.run(run)
    assert not marker.exists()
    assert_same_end(run, runs.whole())


def test_code_that_a_checkpoint_names_never_runs(runs: Runs, tmp_path: Path) -> None:
    """In files that are as they were written, and whose manifest is right."""
    run, marker = runs.stopped_after(2, tmp_path / "run"), tmp_path / "executed"
    checkpoint = newest(run)
    (checkpoint / "modeling_own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "modeling_own.C"}}))
    files = {path.name: _describe(path) for path in checkpoint.iterdir() if path.name != "MANIFEST.json"}
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"format": 2, "files": files}))
    runs.run(run)
    assert_same_end(run, runs.whole())
    runs.run(tmp_path / "again", model__path=newest(runs.whole()), training__steps=1)
    assert not marker.exists()
