"""What records are found again by: a model's weights and all that its configurations say, but not where it lies."""

from __future__ import annotations

from pathlib import Path

import torch

from quietstar.evaluation.item_store import fingerprint
from quietstar.inference.loading import load_thinking
from tests.evaluation.evaluated import evaluate, items, random_model, save


def test_a_model_is_known_by_what_it_does() -> None:
    model = random_model()
    names = [fingerprint(model)]
    model.config.text_config.rope_parameters["rope_theta"] *= 10
    names.append(fingerprint(model))
    model.config.thinking_threshold = 0.5
    names.append(fingerprint(model))
    model.generation_config.eos_token_id = [model.config.eos_token_id, 5]
    names.append(fingerprint(model))
    with torch.no_grad():
        model.thought_embedding.weight[0, 0] += 1
    names.append(fingerprint(model))
    assert len(set(names)) == len(names)


def test_a_model_that_is_moved_is_the_same(tmp_path: Path) -> None:
    one, other = (save(random_model(), tmp_path / name) for name in ("one", "other"))
    assert fingerprint(load_thinking(one, device="cpu")[0]) == fingerprint(load_thinking(other, device="cpu")[0])


def test_a_changed_configuration_is_measured_anew(tmp_path: Path) -> None:
    model = random_model()
    (tmp_path / "text.txt").write_text("some words " * 3)
    found = []
    for theta in (10_000.0, 100.0):
        model.config.text_config.rope_parameters["rope_theta"] = theta
        save(model, tmp_path / "model")
        report = evaluate(tmp_path / "model", tmp_path / "out", text=tmp_path / "text.txt")
        found.append(report["results"][0]["off"]["mean"])
    assert len(items(tmp_path / "out")) == 2
    assert found[0] != found[1]
