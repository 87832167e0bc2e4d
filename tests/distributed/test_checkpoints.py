"""A run of some ranks continues on any number of them, and nothing damaged is continued from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quietstar.errors import CheckpointError
from quietstar.runs.checkpoints import latest_checkpoint
from quietstar.training.checkpoint import load_optimizer_tensors
from quietstar.training.metrics import read_metrics
from tests.distributed.launch import launched, once
from tests.distributed.runs import metrics_of, train

RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole-N`: six steps on N ranks. `M-to-N`: four on M ranks, the last two on N."""
    return once(tmp_path_factory, "runs of ranks", _make_runs)


def _make_runs(out: Path) -> None:
    for first in RANKS:
        begin = [out / f"begun-{first}", out / f"low-{first}"]
        if first == 1:
            for directory in begin:
                train(directory, 4)
        else:
            launched(first, "tests.distributed.runs", *(f"{directory}:4" for directory in begin))
        for then in RANKS:
            shutil.copytree(begin[0], out / f"{first}-to-{then}")
        shutil.copytree(begin[1], out / f"low-{first}-to-{first}")
    for then in RANKS:
        names = [f"whole-{then}", f"low-whole-{then}", f"low-{then}-to-{then}"]
        names += [f"{first}-to-{then}" for first in RANKS]
        if then == 1:
            for name in names:
                train(out / name, 6)
        else:
            launched(then, "tests.distributed.runs", *(f"{out / name}:6" for name in names))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")


@pytest.mark.parametrize("then", RANKS)
@pytest.mark.parametrize("first", RANKS)
def test_a_run_continues_on_another_number_of_ranks(first: int, then: int, runs: Path) -> None:
    """On the same number bit for bit, on another one to the rounding of float32."""
    resumed, whole = runs / f"{first}-to-{then}", runs / f"whole-{then}"
    lines, wanted = (read_metrics(run / "metrics.jsonl") for run in (resumed, whole))
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in wanted]
    for line, want in zip(map(metrics_of, lines), map(metrics_of, wanted), strict=True):
        assert line == (want if first == then else pytest.approx(want, rel=1e-4, abs=1e-5))
    for name, tensor in weights(whole).items():
        if first == then:
            assert torch.equal(weights(resumed)[name], tensor), name
        else:
            torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=2e-4)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_run_in_bfloat16_continues_bit_for_bit(ranks: int, runs: Path) -> None:
    """Its float32 masters are in the checkpoint; the model's own weights have lost what rounding took."""
    found, wanted = weights(runs / f"low-{ranks}-to-{ranks}"), weights(runs / f"low-whole-{ranks}")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())


@pytest.mark.parametrize("ranks", RANKS)
def test_the_checkpoint_is_a_model_of_its_own(ranks: int, runs: Path) -> None:
    import quietstar  # noqa: F401  # registers the model

    step = runs / f"low-whole-{ranks}" / "checkpoints" / "step-00000006"
    assert json.loads((step / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((step / "config.json").read_text())["architectures"] == ["QuietStarForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(step)
    stored = weights(runs / f"low-whole-{ranks}")
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in stored.items())


def test_a_checkpoint_of_two_copies_has_the_shards_of_one(tmp_path: Path, runs: Path) -> None:
    launched(4, "tests.distributed.runs", f"{tmp_path}/copies:4")
    shards = tmp_path / "copies" / "checkpoints" / "step-00000004" / "training"
    assert len(list(shards.iterdir())) == 2
    train(tmp_path / "copies", 6)
    for name, tensor in weights(runs / "whole-1").items():
        torch.testing.assert_close(weights(tmp_path / "copies")[name], tensor, rtol=0, atol=2e-4)


def test_the_state_of_all_ranks_is_that_of_one(runs: Path) -> None:
    one, two, four = (
        load_optimizer_tensors(runs / f"whole-{ranks}" / "checkpoints" / "step-00000006", {}) for ranks in RANKS
    )
    assert one is not None and two is not None and four is not None
    assert one.keys() == two.keys() == four.keys()
    for name, tensor in one.items():
        for other in (two, four):
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("damage", ["missing", "flipped", "shorter", "another"])
@pytest.mark.parametrize("shard", ["shard-00000.safetensors", "shard-00001.safetensors"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(
    shard: str, damage: str, runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "whole-2", run)
    file = run / "checkpoints" / "step-00000006" / "training" / shard
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "shorter":
        file.write_bytes(content[:-1])
    else:
        shutil.copy(file, file.with_name("shard-00002.safetensors"))
        shard = "shard-00002.safetensors"
    with pytest.warns(UserWarning, match=f"training/{shard}.*using .*step-00000004"):
        path = latest_checkpoint(run / "checkpoints")
    assert path is not None and path.name == "step-00000004"
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=f"no checkpoint is whole.*training/{shard}"):
        latest_checkpoint(run / "checkpoints")
