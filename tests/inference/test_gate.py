"""A gate is fitted to what thoughts gain, judged on other texts, and part of the model from then on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.errors import CheckpointError, ConfigError, DataError
from quietstar.gate import main
from quietstar.inference import gate as gains
from quietstar.inference.gate import (
    Moments,
    add,
    choose_strength,
    fit_gate,
    fit_ridge,
    fit_to_others,
    read_gains,
    read_states,
)
from quietstar.inference.gate_choices import BEYOND, NEARLY_ALL, GateReport, choose_way, measure_choices, ways_to_think
from quietstar.inference.loading import load_thinking
from quietstar.model.adapters import add_adapters, has_adapters, trained_state
from quietstar.model.heads import ThinkingGate
from quietstar.model.loading import character_tokenizer
from quietstar.objective.learning import learn
from quietstar.training.checkpoint import load_weights, save_checkpoint, take_snapshot
from quietstar.training.optimizer import build_optimizer
from tests.inference.dense_ridge import dense_ridge
from tests.model.tiny import VOCABULARY, make_ids, make_model
from tests.training.helpers import options

TEXTS = make_ids(8, 9)


@pytest.fixture(scope="module")
def fitted() -> QuietStarForCausalLM:
    model = make_model()
    fit_gate(model, TEXTS)
    return model


def gate_of(model: QuietStarForCausalLM) -> ThinkingGate:
    assert model.thinking_gate is not None
    return model.thinking_gate


def assert_same_gate(actual: QuietStarForCausalLM, expected: QuietStarForCausalLM) -> None:
    assert actual.config.thinking_gate
    assert torch.equal(gate_of(actual).weight, gate_of(expected).weight)
    assert torch.equal(gate_of(actual).bias, gate_of(expected).bias)


# -- gains -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["logits", "log_probs"])
def test_gains_are_those_of_the_prediction(interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With left padding, and in pieces; the mixture of log-probabilities is normalised, as drawing from it does."""
    monkeypatch.setattr(gains, "STREAMS", 6)
    model = make_model(interpolation=interpolation)
    mask = torch.ones_like(TEXTS[:2])
    mask[0, :3] = 0
    found = list(read_gains(model, TEXTS[:2], mask))
    assert len(found) > 1
    prediction = model.predict(TEXTS[:2], mask, anchors=torch.arange(8))
    counted = mask[:, :-1].bool()
    target = TEXTS[:2, 1:, None]
    base, talk = (logits.log_softmax(-1) for logits in (prediction.base_logits, prediction.talk_logits))

    def in_pieces(values: Tensor) -> Tensor:
        return torch.cat([part[kept] for part, kept in zip(values.split(3, 1), counted.split(3, 1), strict=True)])

    for name, expected in (
        ("base_nll", -base.gather(-1, target)[..., 0]),
        ("talk_nll", -talk.gather(-1, target)[..., 0]),
        ("entropy", -(base.exp() * base).sum(-1)),
    ):
        actual = torch.cat([getattr(part, name) for part in found])
        torch.testing.assert_close(actual, in_pieces(expected), atol=1e-5, rtol=0, msg=name)
    row = torch.arange(2)[:, None].expand(2, 8)
    assert torch.equal(torch.cat([part.text for part in found]), in_pieces(row))


@pytest.mark.parametrize("positions", ["all", "every:3", "entropy:4"])
def test_states_come_in_the_order_of_the_gains(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gains, "STREAMS", 6)
    model, mask = make_model(), torch.ones_like(TEXTS[:2])
    mask[0, :3] = 0
    found = list(read_gains(model, TEXTS[:2], mask, positions=positions))
    states = list(read_states(model, TEXTS[:2], mask, positions=positions))
    for part, hidden in zip(found, states, strict=True):
        torch.testing.assert_close(hidden, part.hidden)


# -- fitting -----------------------------------------------------------------------------------------------------------


def linear_case(length: int) -> tuple[QuietStarForCausalLM, Tensor]:
    """Without attention and feed-forward a state knows its own token alone, and here that decides what follows."""
    model = make_model(changes={"vocab_size": 12})
    with torch.no_grad():
        for layer in model.base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model, (torch.arange(12)[:, None] + 5 * torch.arange(length)) % 12


def test_a_gain_that_is_linear_in_the_state_is_recovered() -> None:
    model, texts = linear_case(9)
    report = fit_gate(model, texts, ridge=1e-9)
    (measured,) = read_gains(model, texts)
    assert float(measured.gain.std()) > 0.1
    torch.testing.assert_close(gate_of(model)(measured.hidden), measured.gain, atol=1e-3, rtol=0)
    assert report.r_squared > 0.9999
    for choice in report.choices:
        assert choice.gain == pytest.approx(choice.best_gain, abs=1e-6)
    assert (report.fitted_texts, report.texts, report.tokens) == (9, 3, 24)
    assert report.mean_gain == pytest.approx(report.base_nll - report.talk_nll)


def test_the_way_to_think_is_of_the_fitted_texts() -> None:
    """All texts have the same tokens, each once, so that whichever are fitted to have the gains of any six."""
    model, texts = linear_case(13)
    report = fit_gate(model, texts, ridge=1e-9, held_out=0.5, batch_size=4)
    (measured,) = read_gains(model, texts[:6])
    gain = measured.gain.double().numpy()
    ways = ways_to_think(gain)
    expected = choose_way(gain, gain, ways)
    assert expected.startswith("learned")
    assert report.advised.think == report.chosen and report.advised.low is not None
    assert report.advised.share == pytest.approx(float((gain > ways[expected]).mean()), abs=1.01 / 12)
    assert report.advised.gain == pytest.approx(report.advised.best_gain, abs=1e-6)
    assert model.config.thinking_threshold == report.threshold < 99


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_thresholds_come_from_texts_that_a_fit_has_not_seen(strength: float) -> None:
    """There are nearly as many features as tokens, so a prediction of tokens that were fitted to says nothing about
    others: its thresholds, and the way chosen with them, would be those of fits that know the answers."""
    model, texts = make_model(), TEXTS
    report = fit_gate(model, texts, ridge=strength)
    (measured,) = read_gains(model, texts)
    x, y, text = measured.hidden.double().numpy(), measured.gain.double().numpy(), measured.text.numpy()
    order = np.random.default_rng(0).permutation(8)
    held, fitted = order[:2], order[2:]
    folds = [fitted[first::4] for first in range(4)]
    unseen, seen, gain = [], [], []
    for fold in folds:
        own, others = np.isin(text, fold), np.isin(text, np.setdiff1d(fitted, fold))
        gain.append(y[own])
        for predicted, rows in ((unseen, others), (seen, own | others)):
            weight, bias = dense_ridge(x[rows], y[rows], strength)
            predicted.append(x[own] @ weight + bias)
    out_of_fold, in_fold, gains = (np.concatenate(parts) for parts in (unseen, seen, gain))
    thresholds = [float(choice.think[8:]) for choice in report.choices if choice.think.startswith("learned>")]
    shares = (0.5, 0.8, 0.9, 0.95)
    expected = sorted([0, 0.01, 0.1, *np.quantile(out_of_fold, shares)])
    assert sorted(thresholds) == pytest.approx(expected, rel=0.006, abs=1e-4)
    assert np.quantile(in_fold, shares) != pytest.approx(np.quantile(out_of_fold, shares), rel=0.1)
    kept = {"never": 0.0, "always": float(gains.sum())}
    thought_at = {"never": 0, "always": len(gains)}
    for threshold in thresholds:
        chosen = out_of_fold > threshold
        kept[f"learned>{threshold:g}"], thought_at[f"learned>{threshold:g}"] = float(gains[chosen].sum()), chosen.sum()
    enough = [think for think in kept if kept[think] >= 0.95 * max(kept.values())]
    assert report.chosen == min(enough, key=lambda think: thought_at[think])
    rows = np.isin(text, held)
    weight, bias = dense_ridge(x[~rows], y[~rows], strength)
    error = ((x[rows] @ weight + bias - y[rows]) ** 2).mean()
    assert report.r_squared == pytest.approx(1 - error / y[rows].var(), rel=1e-3)
    assert gate_of(model).weight.numpy() == pytest.approx(weight, rel=1e-3, abs=1e-4)


def test_nothing_is_fitted_to_what_is_held_out(fitted: QuietStarForCausalLM) -> None:
    model, texts = copy.deepcopy(fitted), TEXTS[:4, :6]
    fit_gate(model, texts)
    before, held_out = gate_of(model).weight, 0
    for text in range(len(texts)):
        other = texts.clone()
        other[text] = make_ids(1, 6, seed=5)[0]
        fit_gate(model, other)
        held_out += torch.equal(gate_of(model).weight, before)
    assert held_out == 1  # a quarter of them


def test_the_split_and_the_mode(fitted: QuietStarForCausalLM) -> None:
    model = copy.deepcopy(fitted).train()
    done: list[tuple[int, int]] = []
    report = fit_gate(model, TEXTS, batch_size=1, progress=lambda *place: done.append(place))
    assert model.training and done == [(number, 8) for number in range(1, 9)]
    torch.testing.assert_close(gate_of(model).weight, gate_of(fitted).weight)
    assert report == fit_gate(model, TEXTS, batch_size=1)
    assert report.base_nll != fit_gate(model, TEXTS, seed=1).base_nll
    assert model.config.thinking_threshold == report.threshold
    assert json.loads(json.dumps(report.as_dict()))["choices"][1]["think"] == "always"


def test_choices_by_hand() -> None:
    gain = np.array([2.0, -1.0, 0.5, 0.5])
    predicted = np.array([1.5, 0.2, -0.1, 0.05])
    entropy, text = np.array([0.1, 3.0, 2.0, 1.0]), np.arange(4)
    choices = measure_choices(predicted, gain, entropy, np.full(4, 3.0), text, ways_to_think(predicted), seed=0)
    assert all(choice.low is None and not choice.surely_gains for choice in choices)  # of 4 texts
    rows = {choice.think: choice for choice in choices}
    assert (rows["never"].nll, rows["always"].nll) == (3.0, 2.5)
    above = rows["learned>0.1"]
    assert (above.share, above.gain, above.nll) == (0.5, 0.25, 2.75)
    assert (above.entropy_gain, above.entropy_threshold, above.best_gain) == (-0.125, 1.0, 0.625)
    assert rows["learned>0"].gain == 0.375 and rows["learned>0"].random_gain != above.random_gain


def test_the_control_gains_what_tokens_gain_on_average() -> None:
    """Positions drawn at random gain their share of the mean gain, however well the gate predicts. Of one draw of m of
    n tokens the deviation from that is known; the mean of 20 draws has less by the root of 20."""
    rng = np.random.default_rng(0)
    count = 2000
    gain = rng.normal(0.1, 1.0, count)
    zeros, text = np.zeros(count), np.arange(count)
    scaled = []
    for seed in range(4):
        for choice in measure_choices(gain, gain, zeros, zeros, text, ways_to_think(gain), seed):
            deviation = gain.std() * np.sqrt(choice.share * (1 - choice.share) / (count - 1))
            if deviation:
                scaled.append((choice.random_gain - choice.share * gain.mean()) / deviation)
            else:
                assert choice.random_gain == pytest.approx(choice.share * gain.mean())
    assert np.sqrt(np.mean(np.square(scaled))) == pytest.approx(20**-0.5, rel=0.5)


@pytest.mark.parametrize(
    ("gain", "share"), [([2.0, -1.0, 0.05, 0.0], 0.25), ([1.0, 1.0, 1.0, -9.0], 0.75), ([-1.0] * 4, 0), ([1.0] * 4, 1)]
)
def test_the_way_is_few_thoughts_that_keep_nearly_all(gain: list[float], share: float) -> None:
    predicted = np.array([1.5, 0.2, 0.3, -1.0])
    ways = ways_to_think(predicted)
    way = choose_way(predicted, np.array(gain), ways)
    assert float((predicted > ways[way]).mean()) == share
    assert (way == "never") == (share == 0)


def test_an_interval_is_of_texts() -> None:
    """Of 6 texts with 1 to 6 tokens, where tokens of one text gain the same: as if each had one token of that sum."""
    text = np.repeat(np.arange(6), np.arange(1, 7))
    gain = np.array([3.0, -1.0, 0.5, 2.0, 0.1, -0.2])[text]
    zeros, ways = np.zeros(21), {"always": -1.0}
    (choice,) = measure_choices(zeros, gain, zeros, zeros, text, ways, seed=3)
    rng = np.random.default_rng(0)
    sums = np.bincount(text, gain)
    means = sums[rng.integers(6, size=(20_000, 6))].sum(1) / 21
    assert choice.gain == pytest.approx(sums.sum() / 21)
    assert [choice.low, choice.high] == pytest.approx(list(np.quantile(means, [0.025, 0.975])), abs=0.05)


def report_of(mean: float, slope: float, seed: int, texts: int = 60, length: int = 40) -> GateReport:
    """Of gains that are `mean` + `slope` * (a feature of 16) + noise of 0.02, by what `fit_gate` does with them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(texts * length, 16))
    y = mean + slope * x[:, 0] + 0.02 * rng.normal(size=len(x))
    text = np.repeat(np.arange(texts), length)
    held, fold = text < texts // 4, text % 4
    places = [np.flatnonzero(~held & (fold == number)) for number in range(4)]
    folds = [Moments.of(torch.from_numpy(x[rows]), torch.from_numpy(y[rows])) for rows in places]
    strength = choose_strength(folds, (1e-4, 1e-2, 1.0))
    fits = [(weight.numpy(), float(bias)) for weight, bias in fit_to_others(folds, strength)]
    unseen = np.concatenate([x[rows] @ weight + bias for rows, (weight, bias) in zip(places, fits, strict=True)])
    ways = ways_to_think(unseen)
    weight, bias = fit_ridge(add(folds), strength)
    predicted, gain, zeros = x[held] @ weight.numpy() + float(bias), y[held], np.zeros(int(held.sum()))
    choices = measure_choices(predicted, gain, zeros, zeros, text[held], ways, seed)
    chosen = choose_way(unseen, y[np.concatenate(places)], ways)
    return GateReport(45, 1800, 15, 600, strength, 0.0, 0.0, -float(gain.mean()), choices, chosen)


def test_noise_is_no_reason_to_think() -> None:
    """The best of nine choices gains on noise as well. It once was advised in most of such cases."""
    reports = [report_of(-0.0002, 0.0, seed) for seed in range(8)]
    assert any(report.chosen != "never" for report in reports)
    for report in reports:
        assert report.advised.think == "never" and report.threshold > 99
        assert 'So think="learned" means think="never", at 0.0% of the tokens.' in str(report)
    assert any("which may be chance" in str(report) for report in reports)


@pytest.mark.parametrize("seed", range(3))
def test_a_real_gain_is_a_reason_to_think(seed: int) -> None:
    report = report_of(0.0, 0.02, seed)
    assert report.advised.think == report.chosen == f"learned>{report.threshold:g}"
    assert 0.1 < report.advised.share < 0.7
    assert report.advised.gain > NEARLY_ALL * max(choice.gain for choice in report.choices) * 0.9
    assert f'So think="learned" means think="{report.chosen}"' in str(report) and "may be chance" not in str(report)
    everywhere = report_of(0.05, 0.0, seed)
    assert (everywhere.advised.think, everywhere.threshold) == ("always", -BEYOND)
    assert "nats |" in str(report_of(-0.05, 0.0, seed)) and "nats |" not in str(everywhere)


def test_few_texts_are_no_reason_to_think() -> None:
    report = report_of(0.05, 0.0, seed=0, texts=20)
    assert report.advised.think == "never" and "fewer than 6 texts do not tell" in str(report)


# -- the model with it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    fit_gate(model, TEXTS)
    model.to(torch.float64).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert loaded.dtype == dtype and gate_of(loaded).weight.dtype == torch.float32
    assert_same_gate(loaded, model)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert_same_gate(half, model)
    assert gate_of(half)(torch.ones(2, 3, 32, dtype=torch.float16)).dtype == torch.float32


def test_a_model_without_a_gate_stays_without(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["thinking_gate"]  # as it was before there were gates
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()) and loaded.thinking_gate is None
    never_fitted = make_model(thinking_gate=True)
    assert torch.equal(gate_of(never_fitted)(torch.randn(2, 32)), torch.zeros(2))


def test_training_goes_on_beside_it(tmp_path: Path, fitted: QuietStarForCausalLM) -> None:
    model = copy.deepcopy(fitted).train()
    optimizer = build_optimizer(model, options())
    assert not any("thinking_gate" in name for group in optimizer.groups for name, _ in group.parameters)
    optimizer.backward(learn(model, TEXTS[:2]).loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step(0.1)
    assert_same_gate(model, fitted)
    path = save_checkpoint(tmp_path, take_snapshot(1, model, {}, {}))
    other = make_model(seed=1, thinking_gate=True)
    load_weights(other, path)
    assert_same_gate(other, fitted)
    assert torch.equal(other.mixing_head.output.weight, model.mixing_head.output.weight)
    with pytest.raises(CheckpointError, match=r"the model has no thinking_gate\.bias"):
        load_weights(make_model(), path)


def test_adapters_keep_it(tmp_path: Path, fitted: QuietStarForCausalLM) -> None:
    copy.deepcopy(fitted).base.save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_base(tmp_path / "base", start_text=[5], end_text=[6], thinking_gate=True)
    add_adapters(model, rank=2, alpha=4)
    gate_of(model).weight.copy_(gate_of(fitted).weight)
    assert {"thinking_gate.weight", "thinking_gate.bias"} <= trained_state(model).keys()
    model.save_pretrained(tmp_path / "adapters")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    assert has_adapters(loaded)
    assert_same_gate(loaded, model)
    path = save_checkpoint(tmp_path / "checkpoints", take_snapshot(1, model, {}, {}))
    gate_of(loaded).weight.zero_()
    load_weights(loaded, path)
    assert_same_gate(loaded, model)


# -- the command -------------------------------------------------------------------------------------------------------

SYMBOLS = "".join(map(chr, range(65, 65 + VOCABULARY)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(directory)
    character_tokenizer(SYMBOLS).save_pretrained(str(directory))
    (directory / "text.txt").write_text("".join(SYMBOLS[token] for token in make_ids(1, 200)[0]))
    return directory


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "gated"
    arguments = [str(checkpoint), "--text", str(checkpoint / "text.txt"), "--out", str(out), "--length", "10"]
    assert main([*arguments, "--max_tokens", "155", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "36 tokens of 4 held-out texts; fitted to 99 of 11" in printed.out
    assert "| `always` | 100.0% |" in printed.out and "thought about 15 of 15 texts" in printed.err
    assert [path.name for path in out.parent.iterdir()] == ["gated"]
    model, tokenizer = load_thinking(out, device="cpu")
    before, _ = load_thinking(checkpoint, device="cpu")
    assert tokenizer.get_vocab() == character_tokenizer(SYMBOLS).get_vocab()
    states = before.state_dict()
    assert model.state_dict().keys() - states.keys() == {"thinking_gate.weight", "thinking_gate.bias"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in states.items())
    report = json.loads((out / "gate.json").read_text())
    assert report["format"] == 1 and report["tokens"] == 36
    assert main(arguments) == 2
    assert f"out: {out} exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{model}/config.json/x"], "out: cannot write"),
        (["--text", "{model}/missing.txt"], "missing.txt: no such file"),
        (["--length", "1"], "length: got 1, needs at least 2"),
        (["--max_tokens", "5"], "max_tokens: got 5"),
        (["--length", "100"], "at least 3 texts"),
        (["--positions", "some"], "positions: got 'some'"),
        (["--held_out", "1"], "held_out: got 1.0"),
        (["--batch_size", "0"], "batch_size: got 0"),
    ],
)
def test_what_the_command_refuses(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    usual = ["--text", str(checkpoint / "text.txt"), "--out", str(tmp_path / "out"), "--length", "50"]
    given = [argument.format(model=checkpoint) for argument in arguments]
    assert main([str(checkpoint), *usual, "--device", "cpu", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_fitting_refuses() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"ridge: got \[0\.0\], needs one or more numbers above 0"):
        fit_gate(model, TEXTS, ridge=0.0)
    with pytest.raises(ConfigError, match="ridge: got"):
        fit_gate(model, TEXTS, ridge=())
    with pytest.raises(DataError, match=r"input_ids: got .*\[9\]"):
        fit_gate(model, TEXTS[0])
    with pytest.raises(DataError, match=r"attention_mask: got .*\[7, 9\]"):
        fit_gate(model, TEXTS, torch.ones(7, 9))
    with pytest.raises(DataError, match="got 2 texts of 9 tokens, needs at least 3 texts"):
        fit_gate(model, TEXTS[:2])
    with pytest.raises(DataError, match="fewer than 2 of the texts"):
        fit_gate(model, TEXTS[:, :1])
    with torch.no_grad():
        model.mixing_head.output.weight.zero_()
        model.mixing_head.output.bias.zero_()
    with pytest.raises(DataError, match="no thought changes any prediction"):
        fit_gate(model, TEXTS)
    with torch.no_grad():
        model.mixing_head.output.bias.fill_(float("inf"))
    with pytest.raises(DataError, match="not finite"):
        fit_gate(model, TEXTS)
    assert model.thinking_gate is None and not model.config.thinking_gate
