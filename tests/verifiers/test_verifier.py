"""Scores of verifiers and of plain models, their steps, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quietstar.config.loops import GeneratorOptions
from quietstar.config.training import FinetuningOptions
from quietstar.data.examples import Example
from quietstar.errors import CheckpointError, ConfigError, DataError
from quietstar.verifiers.dpo import train_dpo
from quietstar.verifiers.outcome_reward import encode_steps, step_scores
from quietstar.verifiers.pairs import make_pairs, token_logprobs
from quietstar.verifiers.ranking import process_score
from quietstar.verifiers.training import Kind, TokenScores
from quietstar.verifiers.verifier import KINDS, Verifier
from tests.verifiers.tiny import CHARACTERS, labelled, options, tokenizer, training, write_model

PROMPT = labelled()[0].prompt


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = make_pairs(labelled(), 3, seed=0)
    out = tmp_path_factory.mktemp("dpo")
    where = GeneratorOptions(path=str(base))
    return train_dpo(where, pairs, options(steps=10, beta=0.5, score="mean"), training(), FinetuningOptions(), out)


def test_a_plain_model_scores_by_its_likelihood(base: Path) -> None:
    verifier = Verifier(base, device="cpu", dtype="float64")
    assert (verifier.kind, verifier.default_score) == ("likelihood", "sum")
    (total,), (mean,) = verifier.score(PROMPT, ["ab="]), verifier.score(PROMPT, ["ab="], "mean")
    assert total < 0 and mean == pytest.approx(total / 4)
    assert verifier.score(PROMPT, []) == []
    with pytest.raises(ConfigError, match="is a plain model without a reference"):
        verifier.score(PROMPT, ["a"], "ratio")
    assert Verifier(base, device="cpu", reference=base).score(PROMPT, ["ab="], "ratio") == [0.0]


def test_a_verifier_knows_its_score_its_reference_and_what_is_right(base: Path, trained: Path) -> None:
    verifier, plain = Verifier(trained, device="cpu"), Verifier(base, device="cpu")
    assert (verifier.kind, verifier.default_score, verifier.beta) == ("dpo", "mean", 0.5)
    assert verifier.fingerprint == Verifier(trained, device="cpu").fingerprint != plain.fingerprint
    solutions = [one.completion for one in labelled(1)]
    total, ratio = verifier.score(PROMPT, solutions, "sum"), verifier.score(PROMPT, solutions, "ratio")
    assert ratio == pytest.approx([a - b for a, b in zip(total, plain.score(PROMPT, solutions), strict=True)], abs=1e-4)
    assert min(ratio[:2]) > max(ratio[2:])
    assert verifier.score(PROMPT, solutions) == verifier.score(PROMPT, solutions, "mean") != total


def test_a_reference_that_is_gone_or_another_one_is_refused(base: Path, trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    description = json.loads((copy / "verifier.json").read_text())
    description["reference"]["path"] = str(tmp_path / "nowhere")
    (copy / "verifier.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory.*reference=PATH"):
        Verifier(copy, device="cpu").score(PROMPT, ["a"], "ratio")
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"other is not the reference of its training"):
        Verifier(copy, device="cpu", reference=other).score(PROMPT, ["a"], "ratio")
    moved = Verifier(copy, device="cpu", reference=base)
    assert moved.score(PROMPT, ["a"], "ratio") == Verifier(trained, device="cpu").score(PROMPT, ["a"], "ratio")


def test_another_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    swapped = tokenizer("".join(reversed(CHARACTERS)))  # as large, so that nothing else would notice
    swapped.save_pretrained(copy)
    with pytest.raises(CheckpointError, match=r"copy: its tokenizer .* is not the one that the verifier was trained"):
        Verifier(copy, device="cpu")
    verifier = Verifier(trained, device="cpu")
    with pytest.raises(ConfigError, match=rf"samples.jsonl: made for another tokenizer .* verifier {trained}"):
        verifier.check_tokenizer("0" * 64, "samples.jsonl")


def test_a_damaged_description_is_named(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "verifier.json").write_text('{"format": 1, "kind": "dp')
    with pytest.raises(CheckpointError, match=r"verifier.json: cannot be read"):
        Verifier(copy, device="cpu")
    (copy / "verifier.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match=r"format 2, this version reads format 1"):
        Verifier(copy, device="cpu")


def test_steps_are_scored_by_their_own_tokens(trained: Path) -> None:
    verifier = Verifier(trained, device="cpu")
    steps = ["a0\n", "b1\n", "", "="]
    example, ends = encode_steps(verifier.tokenizer, PROMPT, steps)
    assert ends == [3, 6, 6, 8]  # the last one ends with the end of the sequence
    (tokens,) = token_logprobs(verifier._policy, [example])
    scores = verifier.score_steps(PROMPT, steps)
    assert scores == pytest.approx(
        [*(float(part.mean().exp()) for part in (tokens[:3], tokens[3:6], tokens[3:6], tokens[6:]))]
    )
    ratios = verifier.score_steps(PROMPT, steps, "ratio")
    (whole,) = verifier.score(PROMPT, ["".join(steps)], "ratio")
    assert ratios[-1] == pytest.approx(float(torch.sigmoid(torch.tensor(0.5 * whole))), rel=1e-5)
    assert ratios[1] == ratios[2] and all(0 < ratio < 1 for ratio in ratios)
    with pytest.raises(ConfigError, match="steps are scored by ratio"):
        verifier.score_steps(PROMPT, steps, "sum")


def test_process_scores() -> None:
    scores = [0.5, 0.2, 0.9]
    assert process_score(scores) == pytest.approx(0.09)
    assert process_score(scores, "minimum") == 0.2
    assert process_score(scores, "last") == 0.9
    with pytest.raises(DataError, match="steps: got none"):
        process_score([])


def test_probabilities_that_leave_their_range_are_cut_off() -> None:
    """Those of a head that was trained with the mean squared error may."""
    tokens = torch.tensor([0.4, 1.2, -0.1, 0.3])
    assert step_scores(tokens, [0, 2, 3, 4], probabilities=True) == pytest.approx([0.5, 1.0, 0.0, 0.3])


def test_steps_of_many_solutions_are_those_of_each(base: Path) -> None:
    verifier = Verifier(base, device="cpu")
    candidates = [(PROMPT, ["a0\n", "b1\n"]), ("Q:9A:", ["="]), (PROMPT, ["ab", "", "0"])]
    found = verifier.score_steps_many(candidates)
    for scores, (prompt, steps) in zip(found, candidates, strict=True):
        assert scores == pytest.approx(verifier.score_steps(prompt, steps), rel=1e-4)
    assert verifier.score_steps_many([]) == []
    with pytest.raises(DataError, match="second: steps: got none"):
        verifier.score_steps_many([(PROMPT, ["a"]), (PROMPT, [])], names=["first", "second"])


def test_a_new_kind_is_a_line_in_the_table(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and scoring switched on the names of the kinds: a new one needed changes in five files."""

    def load(policy: nn.Module, directory: Path, description: Mapping[str, Any]) -> tuple[TokenScores, list[Tensor]]:
        worth = torch.tensor(description["worth"], dtype=torch.float64)

        def scores(examples: Sequence[Example], row_length: int, batch_rows: int) -> list[Tensor]:
            return [worth.expand(len(example.tokens) - example.prompt_length) for example in examples]

        return scores, [worth]

    def untrained(*_: object) -> Path:
        raise AssertionError

    constant = Kind(untrained, ("mean",), "constant", {"mean": "mean"}, probabilities=True, load=load)
    monkeypatch.setitem(KINDS, "constant", constant)
    directory = shutil.copytree(base, tmp_path / "constant")
    fingerprints = set()
    for worth in (0.25, 0.5):
        description = {"format": 1, "kind": "constant", "worth": worth}
        (directory / "verifier.json").write_text(json.dumps(description))
        verifier = Verifier(directory, device="cpu")
        assert verifier.score(PROMPT, ["ab=", "a"]) == [worth, worth]
        assert verifier.score_steps(PROMPT, ["a", "b"]) == [worth, worth]
        fingerprints.add(verifier.fingerprint)
    assert len(fingerprints) == 2 and not verifier.logarithmic and constant.names == {"mean": "constant (mean)"}
    with pytest.raises(ConfigError, match="a verifier of kind constant, scores by mean"):
        verifier.score(PROMPT, ["a"], "sum")
