"""`python -m quietstar.plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import MistralConfig

from quietstar.plan import main
from tests.model.tiny import family_config

SHORT = ["--model.thought_length", "2", "--model.lookahead", "2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, small: Callable[..., MistralConfig]) -> str:
    path = tmp_path_factory.mktemp("model")
    small().save_pretrained(path)
    return str(path)


def test_a_plan_needs_no_weights_and_no_text(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--model.path", directory, *SHORT, "--data.length", "16", "--training.batch_size", "2"]
    assert main([*arguments, "--gpu", "H200", f"--json={file}"]) == 0
    text = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "fits: 0." in text and "layer inputs" in text and "RTX-4090" in text
    assert found["fits"] is True and found["device"] == "H200" and found["suggestions"] == []
    memory = found["memory"]
    assert sum(memory["at_the_peak"].values()) == memory["total"] > memory["activations"] > 0
    assert found["tokens"] == {"text": 32, "streams": 2 * 15 * 2 * 5}
    assert set(found["seconds"]) == set(found["flops"])
    assert f"base {found['parameters']['base']:,}" in text


def test_without_a_gpu_the_cpu_is_planned_for(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model.path", directory, *SHORT, "--data.length", "8", "--training.device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "this machine's CPU" in text and "--gpu NAME plans for a GPU" in text
    assert "expected" not in text


@pytest.mark.parametrize(
    ("family", "room_for", "stage"),
    [
        ("mistral", "all", "all"),
        ("mistral", "mlp", "mlp"),
        ("mistral", "layers", "down"),  # takes no more
        ("gpt2", "linears", "linears"),
        ("gemma2", "layers", "layers"),  # a norm follows its products: there is no stage down
        ("gemma2", "mlp", "mlp"),
    ],
)
def test_auto_is_the_stage_that_the_gpu_has_room_for(
    family: str, room_for: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family_config(family).save_pretrained(tmp_path)
    arguments = ["--model.path", str(tmp_path), *SHORT, "--data.length", "8", "--training.replay"]
    found = []
    for replay in (room_for, "auto"):
        file = tmp_path / f"{replay}.json"
        assert main([*arguments, replay, "--gpu", "H200", "--json", str(file)]) == 0
        found.append(json.loads(file.read_text()))
        monkeypatch.setattr("quietstar.planning.plan.usable_memory", lambda gpu: found[0]["memory"]["total"])
    assert found[1]["replay"] == stage
    assert found[1]["fits"]


@pytest.mark.slow
def test_the_papers_setting_is_planned_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["--preset", "mistral-7b", "--gpu", "H200", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["parameters"]["base"] == 7_241_732_096
    assert found["tokens"] == {"text": 8 * 256, "streams": 8 * 255 * 2 * 14}
    tokens = sum(found["tokens"].values())
    # every weight but the embeddings' and lm_head's is multiplied with every token: 2 FLOPs, and 4 more backward
    weights = 7_241_732_096 - 2 * 32000 * 4096
    assert found["flops"]["recomputing layers"] == pytest.approx(2 * weights * tokens, rel=0.02)
    assert found["flops"]["backward pass"] == pytest.approx(4 * weights * tokens, rel=0.02)
    # bfloat16 weights; float32 copies and two moments
    assert found["memory"]["at_the_peak"]["weights"] == pytest.approx(2 * found["parameters"]["total"], rel=1e-3)
    assert found["memory"]["at_the_peak"]["optimizer"] == pytest.approx(12 * found["parameters"]["total"], rel=1e-3)
    assert "from the built-in table" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "Z80"], "gpu: got 'Z80'"),
        (["--gpu"], "gpu: got no value"),
        (["--json", "--gpu"], "json: got no value"),
        (["--data.length", "16"], "model.path: missing"),
        (["--trainnig.steps", "3"], "unknown option --trainnig.steps"),
        (["--json", "no-such-directory/plan.json"], "json: cannot write no-such-directory"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], message: str, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = ["--preset", "plain"] if "model.path" in message else ["--model.path", directory, "--data.length", "8"]
    assert main([*preset, *SHORT, "--gpu", "L4", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_tells_of_both_kinds_of_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--gpu" in text and "--json" in text and "--model.path" in text
