"""An outcome reward model learns what separates completions, and says the same from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar.config.loops import GeneratorOptions
from quietstar.config.training import FinetuningOptions
from quietstar.data.batches import Batch
from quietstar.data.examples import encode_example
from quietstar.errors import CheckpointError, ConfigError, DataError
from quietstar.verifiers.outcome_reward import (
    OutcomeRewardModel,
    load_reward_head,
    orm_step,
    token_probabilities,
    train_orm,
)
from quietstar.verifiers.pairs import rows_of
from quietstar.verifiers.training import load_policy
from quietstar.verifiers.verifier import Verifier
from tests.verifiers.tiny import labelled, options, training


def train(base: Path, out: Path, **changes: Any) -> Path:
    values = {"steps": 60, "batch_size": 8} | changes
    return train_orm(
        GeneratorOptions(path=str(base)), labelled(8), options(**values), training(), FinetuningOptions(), out
    )


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("orm"))


def test_an_untrained_head_says_one_half(base: Path) -> None:
    policy, own = load_policy(str(base))
    examples = [encode_example(own, one.prompt, one.completion) for one in labelled(2)]
    rows = rows_of([examples[:2], examples[2:4]])
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    batch = Batch(rows.tokens, rows.attention_mask, (), loss_mask=rows.loss_mask, values=labels)
    for loss, expected in (("bce", 0.6931472), ("mse", 0.25)):
        model = OutcomeRewardModel(policy, loss)
        assert all(values.eq(0.5).all() for values in token_probabilities(model, examples))
        result = orm_step(model, batch, 0)
        assert float(result.loss.detach()) == pytest.approx(expected)
        assert result.weight == int(rows.loss_mask.sum())


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_it_learns_a_separable_set(base: Path, tmp_path: Path, trained: Path, loss: str) -> None:
    verifier = Verifier(trained if loss == "bce" else train(base, tmp_path, orm_loss=loss), device="cpu")
    assert verifier.kind == "orm" and verifier.default_score == "last"
    scores = verifier.score_many([(one.prompt, one.completion) for one in labelled(8)])
    right = [score for score, one in zip(scores, labelled(8), strict=True) if one.correct]
    wrong = [score for score, one in zip(scores, labelled(8), strict=True) if not one.correct]
    assert min(right) > 0.8 and max(wrong) < 0.2


def test_the_mean_is_over_all_tokens_and_steps_end_where_they_should(trained: Path) -> None:
    verifier = Verifier(trained, device="cpu")
    prompt, solution = labelled()[0].prompt, "aa="
    own = encode_example(verifier.tokenizer, prompt, solution)
    (tokens,) = token_probabilities(load_reward_head(verifier._policy, trained, "bce"), [own])
    assert verifier.score(prompt, [solution]) == pytest.approx([float(tokens[-1])])
    assert verifier.score(prompt, [solution], "mean") == pytest.approx([float(tokens.mean())])
    steps = verifier.score_steps(prompt, ["a", "", "a="])
    assert steps == pytest.approx([float(tokens[0]), float(tokens[0]), float(tokens[-1])])
    with pytest.raises(ConfigError, match=r"got 'sum', but .* kind orm, scores by last, mean"):
        verifier.score(prompt, [solution], "sum")


def test_micro_batches_add_up_to_the_batch(base: Path, tmp_path: Path) -> None:
    """Rows have unequally many tokens, which all count alike."""
    paths = [train(base, tmp_path / str(size), steps=3, micro_batch_size=size) for size in (8, 1)]
    candidates = [(one.prompt, one.completion) for one in labelled(2)]
    scores = [Verifier(path, device="cpu").score_many(candidates) for path in paths]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_one_kind_of_completions_alone_is_refused(base: Path, tmp_path: Path) -> None:
    alone = [one for one in labelled() if one.correct]
    with pytest.raises(DataError, match="12 different ones are all right or all wrong"):
        train_orm(GeneratorOptions(path=str(base)), alone, options(), training(), FinetuningOptions(), tmp_path)


def test_a_head_of_another_width_is_refused(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in trained.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    description = json.loads((copy / "verifier.json").read_text())
    del description["files"]  # as a verifier of an earlier release, which has no hashes
    (copy / "verifier.json").write_text(json.dumps(description))
    head = load_file(copy / "reward_head.safetensors")
    save_file({"weight": head["weight"][:, :-1].contiguous(), "bias": head["bias"]}, copy / "reward_head.safetensors")
    with pytest.raises(CheckpointError, match=r"reward_head.safetensors: cannot be read as the head"):
        Verifier(copy, device="cpu")
    (copy / "reward_head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"reward_head.safetensors: cannot be read as the head"):
        Verifier(copy, device="cpu")
