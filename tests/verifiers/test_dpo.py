"""The DPO loss is TRL's, its reference the initialisation, and a verifier on disk scores as it did in training."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quietstar.config.loops import GeneratorOptions
from quietstar.config.training import FinetuningOptions
from quietstar.data.batches import Batch
from quietstar.errors import CheckpointError, ConfigError, DataError
from quietstar.runs.files import write_json
from quietstar.verifiers import dpo
from quietstar.verifiers import training as verifier_training
from quietstar.verifiers.dpo import dpo_loss, dpo_step, likelihood_step, reference_logprobs, train_dpo
from quietstar.verifiers.pairs import Labelled, Pair, encode_pairs, make_pairs, rows_of
from quietstar.verifiers.training import load_policy
from quietstar.verifiers.verifier import Verifier
from tests.verifiers.tiny import CHARACTERS, labelled, options, training, write_model

PAIRS = make_pairs(labelled(), 2, seed=0)


def train(base: Path, out: Path, pairs: list[Pair] = PAIRS, **changes: Any) -> Path:
    arguments = {name: changes.pop(name) for name in ("kind", "generator") if name in changes}
    lora_rank, save_every = changes.pop("lora_rank", 0), changes.pop("save_every", 0)
    return train_dpo(
        GeneratorOptions(path=str(base)),
        pairs,
        options(**changes),
        training(schedule="constant", save_every=save_every),
        FinetuningOptions(lora_rank=lora_rank),
        out,
        **arguments,
    )


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


def test_loss_and_gradient_are_those_of_trl() -> None:
    trl = pytest.importorskip("trl")
    accelerate = pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    token_logprob = -3 * torch.rand(6, 4, generator=generator)  # chosen completions, then rejected ones
    reference = -6 * torch.rand(3, 2, generator=generator)
    theirs = token_logprob.clone().requires_grad_()
    trainer: Any = object.__new__(trl.DPOTrainer)  # its loss reads no more of a trainer than this
    trainer.__dict__.update(
        model=SimpleNamespace(training=True),
        accelerator=accelerate.Accelerator(cpu=True),
        beta=0.3,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        ld_alpha=None,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    nothing = torch.zeros(6, 4)

    def answers(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(log_probs=theirs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    mask = torch.ones(6, 5, dtype=torch.int64)
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    expected = trainer._compute_loss(answers, batch, return_outputs=False)
    expected.backward()

    ours = token_logprob.clone().requires_grad_()
    loss = dpo_loss(ours.sum(1).view(2, 3).T, reference, beta=0.3).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def batch_of(base: Path, pairs: list[Pair]) -> tuple[Any, Batch]:
    model, own = load_policy(str(base))
    rows = rows_of(encode_pairs(own, pairs))
    reference = reference_logprobs(model, rows, 3)
    names = [f"pair {number}" for number in range(len(pairs))]
    return model, Batch(rows.tokens, rows.attention_mask, names, loss_mask=rows.loss_mask, values=reference)


def test_the_reference_is_the_initialisation(base: Path) -> None:
    model, batch = batch_of(base, PAIRS)
    scored = Verifier(base, device="cpu")
    expected = [scored.score(pair.prompt, [pair.right, pair.wrong]) for pair in PAIRS]
    torch.testing.assert_close(batch.values, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    result = dpo_step(beta=0.5)(model, batch, 0)
    assert float(result.loss.detach()) == pytest.approx(0.6931472, abs=1e-5)  # log 2: nothing has moved
    assert float(result.metrics["margin"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("beta", "nll_weight"), [(0.5, 0.0), (2.0, 0.0), (0.5, 3.0)])
def test_the_loss_of_a_policy_that_has_moved(base: Path, beta: float, nll_weight: float) -> None:
    """Eq. 2 of V-STaR, written out; at the start beta is not seen, since nothing differs from the reference."""
    model, batch = batch_of(base, PAIRS)
    policy = batch.values.double()
    reference = policy + torch.linspace(-2, 3, policy.numel(), dtype=torch.float64).view(-1, 2).sin()
    result = dpo_step(beta, nll_weight)(model, replace(batch, values=reference.float()), 0)
    tokens = (batch.loss_mask & (batch.attention_mask == 1)).sum(1)
    losses = []
    for (right, wrong), (right_before, wrong_before), count in zip(policy, reference, tokens, strict=True):
        margin = beta * ((right - right_before) - (wrong - wrong_before))
        losses.append(math.log1p(math.exp(-margin)) - nll_weight * float(right) / int(count))
    assert float(result.loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_options_reach_the_loss(base: Path, tmp_path: Path) -> None:
    """The first step's loss is log 2 and the NLL of the right completions times its weight."""
    train(base, tmp_path / "small", steps=2, beta=0.1, nll_weight=3.0, batch_size=len(PAIRS))
    first = metrics(tmp_path / "small")[0]
    assert first["loss"] == pytest.approx(math.log(2) + 3.0 * first["right_nll"], rel=1e-4)


def test_micro_batches_add_up_to_the_batch(base: Path, tmp_path: Path) -> None:
    whole = train(base, tmp_path / "whole", nll_weight=0.5)
    parts = train(base, tmp_path / "parts", nll_weight=0.5, micro_batch_size=1)
    for line, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        for name in ("loss", "accuracy", "margin", "right_logprob", "wrong_logprob", "right_nll", "gradient_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-4), name
    solutions = [one.completion for one in labelled(1)]
    prompt = labelled(1)[0].prompt
    scores = [Verifier(path, device="cpu").score(prompt, solutions) for path in (whole, parts)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_saved_verifiers_score_as_seen_in_training(base: Path, tmp_path: Path, lora_rank: int) -> None:
    """The fifth step of one run sees the weights that a run of four steps has saved."""
    everything = {"batch_size": len(PAIRS), "beta": 0.4, "lora_rank": lora_rank}
    train(base, tmp_path / "longer", steps=5, **everything)
    saved = train(base, tmp_path / "saved", steps=4, **everything)
    seen = metrics(tmp_path / "longer")[4]
    assert seen["margin"] > 0.05  # it has moved
    for batch_tokens in (1, 100, 10_000):
        verifier = Verifier(saved, device="cpu", batch_tokens=batch_tokens)
        right = torch.tensor(verifier.score_many([(pair.prompt, pair.right) for pair in PAIRS]))
        wrong = torch.tensor(verifier.score_many([(pair.prompt, pair.wrong) for pair in PAIRS]))
        assert float(right.mean()) == pytest.approx(seen["right_logprob"], rel=1e-5)
        assert float(wrong.mean()) == pytest.approx(seen["wrong_logprob"], rel=1e-5)
        assert float((right > wrong).double().mean()) == pytest.approx(seen["likelihood_accuracy"])
        ratios = verifier.score_many(
            [(pair.prompt, text) for pair in PAIRS for text in (pair.right, pair.wrong)], "ratio"
        )
        difference = torch.tensor(ratios).view(-1, 2) @ torch.tensor([1.0, -1.0])
        assert 0.4 * float(difference.mean()) == pytest.approx(seen["margin"], rel=1e-4, abs=1e-5)


def test_a_killed_training_goes_on_to_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(base, tmp_path / "expected", steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "dpo_step", lambda *arguments: failing_after(3, dpo_step(*arguments)))
        with pytest.raises(RuntimeError, match="killed"):
            train(base, tmp_path / "killed", steps=5, save_every=2)
        assert not (tmp_path / "killed" / "model").exists()
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "reference_logprobs", failing_after(0, reference_logprobs))  # it is computed once
        patch.setattr(verifier_training, "write_json", failing_after(0, write_json))
        with pytest.raises(RuntimeError, match="killed"):  # trained, but not yet in its place
            train(base, tmp_path / "killed", steps=5, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "dpo_step", lambda *arguments: failing_after(0, dpo_step(*arguments)))
        continued = train(base, tmp_path / "killed", steps=5, save_every=2)
    name = "model.safetensors"
    assert (continued / name).read_bytes() == (expected / name).read_bytes()
    assert not (tmp_path / "killed" / "run" / "checkpoints").exists()
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "dpo_step", lambda *arguments: failing_after(0, dpo_step(*arguments)))
        assert train(base, tmp_path / "killed", steps=5) == continued  # finished: nothing is trained
    with pytest.raises(CheckpointError, match=r"verifier.beta was 0.1 and is 0.2"):
        train(base, tmp_path / "killed", steps=5, beta=0.2)


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    left = [calls]

    def call(*arguments: Any) -> Any:
        if not left[0]:
            raise RuntimeError("killed")
        left[0] -= 1
        return function(*arguments)

    return call


def test_the_control_without_negatives_learns_the_right_ones(base: Path, tmp_path: Path) -> None:
    model, batch = batch_of(base, PAIRS)
    tokens = batch.loss_mask & (batch.attention_mask == 1)
    result = likelihood_step(model, batch, 0)
    assert float(result.loss.detach()) == pytest.approx(float((-batch.values[:, 0] / tokens.sum(1)).mean()), rel=1e-5)
    saved = train(base, tmp_path, kind="likelihood", steps=8)
    verifier = Verifier(saved, device="cpu")
    assert verifier.kind == "likelihood"
    before = Verifier(base, device="cpu").score(PAIRS[0].prompt, [PAIRS[0].right])[0]
    assert verifier.score(PAIRS[0].prompt, [PAIRS[0].right])[0] > before + 1
    assert verifier.score(PAIRS[0].prompt, [PAIRS[0].right], "ratio")[0] > 1


def test_a_generator_with_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", characters=CHARACTERS + "xyz")
    with pytest.raises(ConfigError, match=rf"start from {base}, whose tokenizer is not that of the generator {other}"):
        train(base, tmp_path / "out", generator=str(other))


def test_bad_input_is_named_before_anything_is_trained(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"verifier.beta: got 0"):
        train(base, tmp_path, beta=0.0)
    with pytest.raises(ConfigError, match=r"verifier.micro_batch_size: got 3, which does not divide"):
        train(base, tmp_path, micro_batch_size=3)
    long = make_pairs([Labelled("long", "Q:", "a" * 70, True), Labelled("long", "Q:", "b", False)], 1, seed=0)
    with pytest.raises(DataError, match=r"problem long: .* 73 tokens, but the model's context has 64"):
        train(base, tmp_path, pairs=long)
    assert not list(tmp_path.iterdir())
