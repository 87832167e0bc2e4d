"""A run of V-STaR with two iterations: who is trained on what, and who has sampled and scored what."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar import vstar
from quietstar.config.loops import GeneratorOptions, VerifierOptions
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.examples import encode_example
from quietstar.data.tokenizer import load_tokenizer
from quietstar.model.loading import load_causal_lm, weights_sha256
from quietstar.outer_loop.finetune import fine_tune
from quietstar.runs.checkpoints import describe
from quietstar.sampling.requests import sample_seed
from quietstar.verifiers.dpo import train_dpo
from quietstar.verifiers.outcome_reward import train_orm
from quietstar.verifiers.pairs import Labelled, make_pairs
from quietstar.verifiers.verifier import Verifier
from tests.outer_loop.few_sums import OF_NO_PROBLEM, SOLVED, SUMS, TASK, worked_out
from tests.outer_loop.loops import VERIFIER, arguments, kept, manifest, outputs, rows
from tests.outer_loop.recomputed import (
    Line,
    accepted,
    accuracy,
    answer,
    best_right,
    by_problem,
    greedy,
    ids_of,
    is_right,
    lines_of,
    mean_of_subsets,
    plain,
    token_logprobs,
    vote_right,
)

PT = {"format": "pt"}
CANDIDATES, KS = 5, (1, 2, 3)
TRAINING: dict[str, Any] = {
    **{"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "save_every": 0},
    **{"weight_decay": 0.0, "report": False, "device": "cpu", "threads": 1},
}
OF_VERIFIER: dict[str, Any] = {
    **{"beta": 0.5, "pairs_per_problem": 3, "steps": 10, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 1},
}
LOOP: dict[str, Any] = {
    "task": TASK,
    "problems.test_limit": 6,
    "loop.iterations": 2,
    "loop.rationalize": "false",
    "loop.demonstrations": "true",
    "loop.supervised_start": "true",
    "loop.supervised_steps": 6,
    "loop.accumulate": "all",
    "loop.keep_models": "all",
    "sampling.samples": 6,
    **{f"verifier.{key}": value for key, value in OF_VERIFIER.items()},
    "evaluation.candidates": CANDIDATES,
    "evaluation.ks": "1,2,3",
}


@pytest.fixture(scope="module")
def run(adder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As section 3.1 of V-STaR has it."""
    out = tmp_path_factory.mktemp("vstar")
    assert vstar.main(arguments(adder, out, VERIFIER, LOOP)) == 0
    return out


def generator(run: Path, number: int) -> Path:
    """The model that an iteration ends with; 0 is the SFT generator."""
    return run / f"iteration-{number:02d}/model"


def demonstrated() -> list[tuple[str, str, str]]:
    """(problem, prompt, completion) of each human example."""
    return [(name, f"{name}=", worked_out(name)) for name in SOLVED] + [("", *OF_NO_PROBLEM)]


def sampled(run: Path, iteration: int) -> list[Line]:
    """The samples to learn from, in the order of the problems."""
    order = SUMS["train"].index
    return sorted(lines_of(run, iteration, "sample"), key=lambda line: (order(line["problem"]), line["index"]))


def test_verdicts_are_whether_the_sum_is_right(run: Path) -> None:
    lines = [line for i in (1, 2) for line in sampled(run, i)] + lines_of(run, 2, "candidates")
    assert {line["correct"] for line in lines} == {True, False}
    assert all((line["answer"], line["correct"]) == (answer(line["text"]), is_right(line)) for line in lines)


def test_each_generator_is_the_base_trained_on_human_and_right_completions_so_far(
    adder: Path, run: Path, tmp_path: Path
) -> None:
    """On the demonstrations first, then all that was right in the iterations until then, each text once."""
    sha256, tokenizer = weights_sha256(load_causal_lm(adder, torch.float32)), load_tokenizer(adder)
    right: dict[tuple[str, str], int] = {}
    for iteration in (0, 1, 2):
        for line in sampled(run, iteration) if iteration else ():
            name = line["problem"], accepted(line["text"])
            if is_right(line) and name not in {(problem, text) for problem, _, text in demonstrated()}:
                right.setdefault(name, iteration)
        found = kept(run, iteration) if iteration else []
        assert [((one["problem"], one["completion"]), one["iteration"]) for one in found] == list(right.items())
        texts = [(prompt, text) for _, prompt, text in demonstrated()]
        texts += [(f"{problem}=", text) for problem, text in right]
        trained = fine_tune(
            adder,
            sha256,
            tokenizer,
            [encode_example(tokenizer, *text) for text in texts],
            48,
            lambda _, steps=(6, 4, 5)[iteration]: steps,
            GeneratorOptions(),
            FinetuningOptions(),
            TrainingOptions(**TRAINING, seed=sample_seed(0, iteration, "train") % 2**31),
            tmp_path / str(iteration),
            "",
        )
        assert trained == outputs(run, iteration, "train")
    assert set(right.values()) == {1, 2}  # otherwise little has been tested


def test_who_has_sampled(run: Path) -> None:
    """The log-probability that came with a sample is its generator's: iteration i asks generator i - 1, and the last
    one writes the candidates; greedy answers are those that transformers' own `generate` writes."""
    for number, iteration, purpose in ((0, 1, "sample"), (1, 2, "sample"), (2, 2, "candidates")):
        for line in lines_of(run, iteration, purpose):
            ended = line["finish_reason"] == "stop"
            found = token_logprobs(generator(run, number), f"{line['problem']}=", line["text"], ended)
            assert line["logprob"] == pytest.approx(float(found.sum()), abs=1e-3)
            assert line["tokens"] == len(found)
        sha256 = weights_sha256(load_causal_lm(generator(run, number), torch.float32))
        assert manifest(run, iteration, purpose)["inputs"]["model"] == sha256
    for number in (0, 1, 2):
        lines = lines_of(run, number, "evaluate")
        assert len(lines) == len({line["problem"] for line in lines}) == 6
        for line in lines:
            assert line["text"] == greedy(generator(run, number), f"{line['problem']}=", 16)


def test_what_is_sampled_is_of_its_split(run: Path) -> None:
    problems = {
        (iteration, purpose): set(by_problem(lines_of(run, iteration, purpose)))
        for iteration, purpose in ((1, "sample"), (2, "sample"), (2, "candidates"), (0, "evaluate"), (2, "evaluate"))
    }
    for (_, purpose), names in problems.items():
        assert names < set(SUMS["train" if purpose == "sample" else "test"]) and len(names) == 6
    assert problems[2, "candidates"] == problems[0, "evaluate"] == problems[2, "evaluate"]
    assert problems[1, "sample"] != problems[2, "sample"]
    assert {len(own) for own in by_problem(lines_of(run, 2, "candidates")).values()} == {CANDIDATES}


def labelled(run: Path) -> list[Labelled]:
    """D_VER from the store alone: human solutions of the problems, then all samples of both iterations."""
    human = [Labelled(problem, prompt, text, True) for problem, prompt, text in demonstrated() if problem]
    return human + [
        Labelled(line["problem"], f"{line['problem']}=", accepted(line["text"]), is_right(line))
        for iteration in (1, 2)
        for line in lines_of(run, iteration, "sample")
    ]


def test_the_verifier_is_the_sft_generator_trained_on_the_samples_of_all_iterations(run: Path, tmp_path: Path) -> None:
    """And so are the models that it is compared with."""
    data = labelled(run)
    texts: dict[tuple[str, bool], set[str]] = {}
    for one in data:
        texts.setdefault((one.problem, one.correct), set()).add(one.completion)
    products = [len(own) * len(texts.get((name, False), ())) for (name, correct), own in texts.items() if correct]
    pairs = make_pairs(data, 3, 0)
    assert len(pairs) == sum(min(3, product) for product in products) > 3
    assert all(pair.right in texts[pair.problem, True] for pair in pairs)
    assert all(pair.wrong in texts[pair.problem, False] for pair in pairs)

    base = GeneratorOptions(path=str(generator(run, 0)))
    rest = (VerifierOptions(**OF_VERIFIER), TrainingOptions(**TRAINING), FinetuningOptions())
    again = {
        "dpo": train_dpo(base, pairs, *rest, tmp_path / "dpo"),
        "likelihood": train_dpo(base, pairs, *rest, tmp_path / "likelihood", kind="likelihood"),
        "orm": train_orm(base, data, *rest, tmp_path / "orm"),
    }
    for kind, expected in again.items():
        directory = run / "verifiers" / kind / "model"
        hashes = {weights_sha256(load_causal_lm(path, torch.float32)) for path in (directory, expected)}
        assert len(hashes) == 1, kind
        made = outputs(run, 2, f"verifier_{kind}")
        assert (made["pairs"], made["completions"]) == (len(pairs), len(data))
        description = json.loads((directory / "verifier.json").read_text())
        reference = weights_sha256(load_causal_lm(description["reference"]["path"], torch.float32))
        sft = manifest(run, 2, f"verifier_{kind}")["inputs"]["sft"]
        assert reference == sft == outputs(run, 0, "train")["model_sha256"]
    heads = [load_file(path / "reward_head.safetensors") for path in (run / "verifiers/orm/model", again["orm"])]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in ("weight", "bias"))


def probabilities(run: Path, prompt: str, completion: str) -> torch.Tensor:
    """What the outcome reward model says after each token of a completion, its end included."""
    directory = run / "verifiers/orm/model"
    head = load_file(directory / "reward_head.safetensors")
    ids, start = ids_of(directory, prompt, completion, ended=True)
    with torch.no_grad():
        states = plain(directory)[0].model(input_ids=ids).last_hidden_state[0, start:]
        return (states @ head["weight"][0].double() + head["bias"].double()).sigmoid()


def test_verifiers_tell_right_from_wrong_samples(run: Path) -> None:
    """On what they were trained on, seen with plain transformers models: the log-ratio of DPO's to the SFT generator,
    and the probability of the outcome reward model, are higher for right completions; the control without negatives
    makes right ones likelier."""
    found: dict[str, dict[bool, list[float]]] = {}
    for one in dict.fromkeys(labelled(run)):
        given = (one.prompt, one.completion)
        reference = token_logprobs(generator(run, 0), *given).sum()
        for kind in ("dpo", "likelihood"):
            ratio = float(token_logprobs(run / "verifiers" / kind / "model", *given).sum() - reference)
            found.setdefault(kind, {}).setdefault(one.correct, []).append(ratio)
        said = probabilities(run, *given).mean()
        found.setdefault("orm", {}).setdefault(one.correct, []).append(float(said))
    means = {kind: {correct: float(np.mean(own[correct])) for correct in own} for kind, own in found.items()}
    assert means["dpo"][True] > means["dpo"][False] + 0.1
    assert means["orm"][True] > means["orm"][False]
    assert means["likelihood"][True] > 0.1


MODELS = {
    "verifier": "verifiers/dpo/model",
    "right completions alone": "verifiers/likelihood/model",
    "outcome reward model": "verifiers/orm/model",
    "SFT generator": "iteration-00/model",
    "final generator": "iteration-02/model",
}
HOWS = {"sum": "sum", "mean": "mean", "log-ratio": "ratio", "last token": "last"}


def test_every_column_of_the_scores_is_its_models(run: Path) -> None:
    """As a verifier of that directory says, and as plain transformers models say."""
    lines = sorted(lines_of(run, 2, "candidates"), key=lambda one: (one["problem"], one["index"]))
    table = sorted(rows(run / "iteration-02/scores.jsonl"), key=lambda one: (one["problem"], one["index"]))
    assert [(row["problem"], row["index"]) for row in table] == [(line["problem"], line["index"]) for line in lines]
    given = [(f"{line['problem']}=", accepted(line["text"])) for line in lines]
    columns = {(model, how) for model in ("verifier", "right completions alone") for how in ("sum", "mean")}
    columns |= {(f"{which} generator", how) for which in ("SFT", "final") for how in ("sum", "mean")}
    columns |= {("verifier", "log-ratio"), ("outcome reward model", "last token"), ("outcome reward model", "mean")}
    assert set(table[0]["scores"]) == {f"{model} ({how})" for model, how in columns}
    logprobs = {
        model: [token_logprobs(run / place, *one) for one in given]
        for model, place in MODELS.items()
        if model != "outcome reward model"
    }
    said = [probabilities(run, *one) for one in given]
    for model, how in columns:
        scores = [row["scores"][f"{model} ({how})"] for row in table]
        verifier = Verifier(run / MODELS[model], device="cpu")
        assert scores == pytest.approx(verifier.score_many(given, HOWS[how]), abs=1e-4)
        if how == "log-ratio":
            pairs = zip(logprobs[model], logprobs["SFT generator"], strict=True)
            expected = [float(own.sum() - other.sum()) for own, other in pairs]
        elif model == "outcome reward model":
            expected = [float(own[-1] if how == "last token" else own.mean()) for own in said]
        else:
            expected = [float(own.sum() if how == "sum" else own.mean()) for own in logprobs[model]]
        assert scores == pytest.approx(expected, abs=1e-4), (model, how)
        assert np.ptp(scores) > 1e-3


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_choosing_among_candidates_is_counted_subset_by_subset(run: Path) -> None:
    """pass@k, majority and weighted votes and best of k, for every score, over all subsets of the candidates."""
    scores = {(row["problem"], row["index"]): row["scores"] for row in rows(run / "iteration-02/scores.jsonl")}
    problems = [
        (
            [answer(line["text"]) for line in own],
            [is_right(line) for line in own],
            [scores[line["problem"], line["index"]] for line in own],
        )
        for own in by_problem(lines_of(run, 2, "candidates")).values()
    ]

    def expected(measure: str, k: int, name: str | None) -> float:
        values = []
        for answers, right, own in problems:
            column: Sequence[float] = [1.0] * CANDIDATES if name is None else [row[name] for row in own]
            if measure == "weighted-vote" and name is not None and not name.startswith("outcome"):
                column = [math.exp(value) for value in column]
            values.append(
                mean_of_subsets(
                    CANDIDATES,
                    k,
                    lambda subset, a=answers, c=column, r=right: {
                        "pass": lambda: float(any(r[i] for i in subset)),
                        "maj": lambda: vote_right(a, c, r, subset),
                        "weighted-vote": lambda: vote_right(a, c, r, subset),
                        "best-of": lambda: best_right(c, r, subset),
                    }[measure](),
                )
            )
        return float(np.mean(values))

    table = summary_of(run)["candidates"]
    assert table["compared"] == "verifier (sum)" and table["problems"] == 6
    found = {(row["measure"], row["k"], row["score"]): row["value"]["mean"] for row in table["rows"]}
    names = set(next(iter(scores.values())))
    assert {key for key in found if key[0] == "best-of"} == {("best-of", k, name) for k in KS for name in names}
    assert {key[:2] for key in found if key[2] is None} == {(way, k) for way in ("pass", "maj") for k in KS}
    weighed = {key[2] for key in found if key[0] == "weighted-vote"}
    assert weighed >= {name for name in names if "log-ratio" not in name}
    for key, value in found.items():
        if key[0] != "weighted-vote" or "log-ratio" not in str(key[2]):
            assert value == pytest.approx(expected(*key), abs=1e-9), key
    assert 0 < found["pass", 1, None] < found["pass", 3, None]  # otherwise little has been tested


def test_the_summary_counts_what_the_store_has(run: Path) -> None:
    table = summary_of(run)["iterations"]
    assert [row["iteration"] for row in table] == [0, 1, 2]
    common = set(by_problem(sampled(run, 1))) & set(by_problem(sampled(run, 2)))
    solved = {
        i: {line["problem"] for line in sampled(run, i) if is_right(line)} & common if i else set() for i in (0, 1, 2)
    }
    for row in table:
        iteration = row["iteration"]
        held_out = lines_of(run, iteration, "evaluate")
        assert row["held_out"]["accuracy"] == pytest.approx(accuracy(held_out))
        assert row["held_out"]["low"] <= row["held_out"]["accuracy"] <= row["held_out"]["high"]
        assert row["held_out"]["correct"] == sum(map(is_right, held_out))
        if not iteration:
            continue
        lines = sampled(run, iteration)
        assert row["sampled"]["accuracy"] == pytest.approx(accuracy(lines))
        counts = {key: row["sampled"][key] for key in ("problems", "samples", "correct", "solved", "failures")}
        right = [line for line in lines if is_right(line)]
        names = {line["problem"] for line in right}
        assert counts == {
            **{"problems": 6, "samples": 36, "failures": 0},
            **{"correct": len(right), "solved": len(names)},
        }
        cut = [line for line in lines if line["finish_reason"] == "length"]
        assert row["sampled"]["truncated"] == pytest.approx(len(cut) / 36)
        assert row["sampled"]["tokens"] == pytest.approx(np.mean([line["tokens"] for line in lines]))
        before, now = solved[iteration - 1], solved[iteration]
        grown = {key: row[key] for key in ("newly_solved", "lost", "kept", "ever")}
        ever = len(set().union(*(solved[i] for i in range(iteration + 1))))
        assert grown == {
            **{"newly_solved": len(now - before), "lost": len(before - now)},
            **{"kept": len(before & now), "ever": ever},
        }
        own = [one for one in kept(run, iteration) if one["iteration"] == iteration]
        texts: dict[str, set[str]] = {}
        for one in own:
            texts.setdefault(one["problem"], set()).add(one["completion"])
        sizes = [len(own) for own in texts.values()]
        assert row["distinct"] == {"problems": len(sizes), "mean": pytest.approx(np.mean(sizes)), "most": max(sizes)}
        last = rows(run / f"iteration-0{iteration}/train/metrics.jsonl")[-1]["step"]
        assert row["trained"]["steps"] == last == (4, 5)[iteration - 1]
        assert row["built"]["kept"] == len(kept(run, iteration)) and row["built"]["new"] == len(right)


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("model", ["verifiers/dpo", "iteration-00", "iteration-02"])
def test_nothing_is_scored_by_changed_weights(
    model: str, described: bool, adder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where the description of a verifier has the hashes of the changed ones: the run has its own record."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "iteration-02/score.json").unlink()
    (copy / "iteration-02/measure.json").unlink()
    directory = copy / model / "model"
    weights = load_file(directory / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, directory / "model.safetensors", PT)
    if described and (directory / "verifier.json").is_file():
        description = json.loads((directory / "verifier.json").read_text())
        description["files"] = {file.name: describe(file) for file in directory.glob("*.safetensors")}
        (directory / "verifier.json").write_text(json.dumps(description))
    capsys.readouterr()
    assert vstar.main(arguments(adder, copy, VERIFIER, LOOP)) == 2
    assert str(directory) in capsys.readouterr().err
    assert not (copy / "iteration-02/score.json").exists()
