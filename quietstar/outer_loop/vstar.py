"""V-STaR (arXiv 2402.06457, Algorithm 1): a verifier trained on right and wrong completions, and its measurement.

The iterations are those of `star.py`; the verifier is trained once, on the samples of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quietstar.config.loops import parse_ks
from quietstar.config.parsing import parse_json
from quietstar.config.training import TrainingOptions
from quietstar.errors import CheckpointError
from quietstar.outer_loop.finetune import forget_other_run, free_memory
from quietstar.outer_loop.phases import key_of
from quietstar.outer_loop.sampled import Generator, verdict_of
from quietstar.outer_loop.star import OuterLoop, finetuning_inputs
from quietstar.outer_loop.store import Sample
from quietstar.outer_loop.training_set import demonstrations
from quietstar.runs.checkpoints import MAY_CHANGE
from quietstar.runs.files import write_whole
from quietstar.statistics.candidate_table import measure_candidates
from quietstar.statistics.candidates import Candidates
from quietstar.statistics.ranking import calibration
from quietstar.verifiers.pairs import Labelled, make_pairs
from quietstar.verifiers.training import Kind, LabelledData
from quietstar.verifiers.verifier import KINDS, PLAIN, Verifier

VERIFIERS = "verifiers"
SCORES = "scores.jsonl"
SFT, FINAL = "sft", "final"
NAMES = {
    **{name: kind.names for name, kind in KINDS.items()},
    SFT: {"sum": "SFT generator (sum)", "mean": "SFT generator (mean)"},
    FINAL: {"sum": "final generator (sum)", "mean": "final generator (mean)"},
}
"""Names of the measured scores in tables, by model and score. A `ratio` is the log-ratio to the SFT generator, the
verifier's reference."""
MAIN = next(iter(KINDS))


def labelled_completions(loop: OuterLoop) -> list[Labelled]:
    """Returns D_VER: the samples of all iterations with their labels, and human solutions as right ones (section
    3.1).
    """
    prompts = {problem.id: loop.task.prompt(problem) for problem in loop.train_problems}
    human = [
        Labelled(one.problem, one.prompt, one.completion, True) for one in demonstrations(loop.task) if one.problem
    ]
    sampled = [
        Labelled(
            sample.place.problem,
            prompts[sample.place.problem],
            loop.task.accepted(sample.generation.text),
            verdict_of(sample).correct,
        )
        for iteration in range(1, loop.config.loop.iterations + 1)
        for sample in loop.samples(iteration, "sample")
    ]
    return human + sampled


def train_verifiers(loop: OuterLoop, sft: Generator) -> dict[str, Path]:
    """Trains the verifier, and with `verifier.baselines` the models that it is compared with.

    Args:
        loop: Outer loop with finished iterations.
        sft: SFT generator (G_SFT): initialisation of every verifier, and the reference of DPO.

    Returns:
        Directory of each verifier by kind: the first kind of `KINDS`, or all of them.

    Raises:
        DataError: No problem has a right and a wrong completion.
    """
    config = loop.config
    labelled = labelled_completions(loop)
    pairs = make_pairs(labelled, config.verifier.pairs_per_problem, loop.seed)
    base = replace(config.model, path=sft.path)
    training = verifier_training(config.training)
    own = [option for kind in KINDS.values() for option in kind.options]
    ignored = {"score", "baselines", "micro_batch_size", *own}
    fixed = {key: value for key, value in asdict(config.verifier).items() if key not in ignored}
    inputs = {
        "sft": sft.sha256,
        "data": key_of({"labelled": [asdict(one) for one in labelled]}),
        **{f"verifier.{key}": value for key, value in fixed.items()},
        **{f"training.{key}": value for key, value in asdict(training).items() if key not in MAY_CHANGE},
        **finetuning_inputs(config.finetuning),
    }
    data = LabelledData(labelled, pairs)
    found = {}
    for name, kind in KINDS.items():
        if name != MAIN and not config.verifier.baselines:
            continue
        out = loop.out / VERIFIERS / name

        def work(key: str, kind: Kind = kind, out: Path = out) -> dict[str, Any]:
            loop.end_server()
            loop.check_weights(sft)
            forget_other_run(out, key)
            directory = kind.train(base, data, config.verifier, training, config.finetuning, out)
            free_memory()
            fingerprint = Verifier(directory, device=config.training.device).fingerprint
            return {"pairs": len(pairs), "completions": len(labelled), "sha256": fingerprint}

        asked = inputs | {f"verifier.{option}": getattr(config.verifier, option) for option in kind.options}
        loop.phases.run(config.loop.iterations, f"verifier_{name}", asked, work)
        found[name] = out / "model"
    return found


def verifier_training(options: TrainingOptions) -> TrainingOptions:
    """Returns the generators' training options that also hold for verifiers; the others are `verifier.*`."""
    return replace(options, report=False, log_to="")


def measure(loop: OuterLoop, generators: Sequence[Generator], verifiers: Mapping[str, Path]) -> dict[str, Any]:
    """Measures pass@k, votes and Best-of-k on candidates for the held-out problems, ranked by each score.

    Args:
        loop: Outer loop with finished iterations.
        generators: Generators that `OuterLoop.run` returned.
        verifiers: Directories of the verifiers by kind; empty: pass@k and votes only.

    Returns:
        `CandidateTable.to_json`, with the name of the score that is compared with the others as `compared`.
    """
    config, last = loop.config, loop.config.loop.iterations
    options = replace(config.sampling, samples=config.evaluation.candidates, temperature=config.evaluation.temperature)
    samples, summary = loop.completions.of(last, "candidates", generators[-1], loop.test_problems, options)
    models: dict[str, Path | str] = {**verifiers}
    if verifiers:
        models |= {SFT: generators[0].path, FINAL: generators[-1].path}
    weights = {kind: loop.verifier_sha256(kind) for kind in verifiers}
    inputs = {
        "candidates": summary["sha256"],
        "scores": {model: NAMES[model] for model in models},
        "weights": {**weights, "sft": generators[0].sha256, "final": generators[-1].sha256},
    }
    file = loop.phases.directory_of(last) / SCORES

    def score(_: str) -> dict[str, Any]:
        loop.end_server()
        for generator in (generators[0], generators[-1]) if verifiers else ():
            loop.check_weights(generator)
        return {"sha256": _write_scores(file, _scores(loop, samples, models))}

    scored = loop.phases.run(last, "score", inputs, score)
    compared = NAMES[MAIN][config.verifier.score] if verifiers else None

    def tabulate(_: str) -> dict[str, Any]:
        problems = candidates_of(samples, _read_scores(file, scored["sha256"]))
        likelihoods = [model for model in models if not KINDS.get(model, KINDS[PLAIN]).probabilities]
        logarithmic = [NAMES[model][how] for model in likelihoods for how in ("sum", "mean")]
        table = measure_candidates(
            problems,
            parse_ks(config.evaluation.ks),
            compare=compared,
            logarithmic=logarithmic,
            resamples=config.evaluation.resamples,
        )
        return {**table.to_json(), "compared": compared, "calibration": _calibration(problems)}

    asked = {
        "scores": scored["sha256"],
        "evaluation": asdict(config.evaluation),
        "verifier.score": config.verifier.score,
    }
    return loop.phases.run(last, "measure", asked, tabulate)


def _calibration(problems: Sequence[Candidates]) -> dict[str, Any]:
    """Returns the calibration of those scores that are probabilities; empty if there are none."""
    names = [kind.names[kind.scores[0]] for kind in KINDS.values() if kind.probabilities]
    right = [correct for problem in problems for correct in problem.correct]
    found = {}
    for name in names:
        if all(name in problem.scores for problem in problems):
            # a model trained with the mean squared error may leave 0..1
            said = [min(1.0, max(0.0, value)) for problem in problems for value in problem.scores[name]]
            found[name] = asdict(calibration(said, right))
    return found


def candidates_of(samples: Sequence[Sample], scores: Mapping[tuple[str, int], Mapping[str, float]]) -> list[Candidates]:
    """Returns the candidates of each problem with their scores."""
    by_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.place.problem, []).append(sample)
    found = []
    for problem, own in by_problem.items():
        rows = [scores[problem, sample.place.index] for sample in own]
        found.append(
            Candidates(
                problem,
                [verdict_of(sample).answer for sample in own],
                [verdict_of(sample).correct for sample in own],
                {name: [row[name] for row in rows] for name in rows[0]},
            )
        )
    return found


def _scores(
    loop: OuterLoop, samples: Sequence[Sample], models: Mapping[str, Path | str]
) -> dict[tuple[str, int], dict[str, float]]:
    prompts = {problem.id: loop.task.prompt(problem) for problem in loop.test_problems}
    asked = [(prompts[one.place.problem], loop.task.accepted(one.generation.text)) for one in samples]
    names = [f"problem {one.place.problem}" for one in samples]
    columns: dict[str, Sequence[float]] = {}
    for model, path in models.items():  # one in memory at a time, and each reads the candidates once
        loop.tell(f"  {model}")
        verifier = Verifier(path, device=loop.config.training.device, dtype=loop.config.model.dtype)
        if model in KINDS and verifier.fingerprint != loop.verifier_sha256(model):
            last = loop.phases.directory_of(loop.config.loop.iterations)
            raise CheckpointError(
                f"{path}: its weights are not those that the run has trained; put back what was there, or delete "
                f"{last / f'verifier_{model}.json'} and {Path(path).parent} to have it trained again"
            )
        hows = [how for how in NAMES[model] if how != "ratio"]
        columns |= {NAMES[model][how]: found for how, found in verifier.scores(asked, hows, names).items()}
        del verifier
        free_memory()
    for model in models:
        if "ratio" in NAMES[model]:
            pairs = zip(columns[NAMES[model]["sum"]], columns[NAMES[SFT]["sum"]], strict=True)
            columns[NAMES[model]["ratio"]] = [own - reference for own, reference in pairs]
    return {
        (one.place.problem, one.place.index): {name: column[place] for name, column in columns.items()}
        for place, one in enumerate(samples)
    }


def _write_scores(file: Path, scores: Mapping[tuple[str, int], Mapping[str, float]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"problem": problem, "index": index, "scores": dict(values)})
        for (problem, index), values in scores.items()
    ]
    write_whole(file, "\n".join(lines) + "\n")
    return key_of({"lines": lines})


def _read_scores(file: Path, sha256: str) -> dict[tuple[str, int], dict[str, float]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    if key_of({"lines": lines}) != sha256:
        raise CheckpointError(f"{file}: is not what the run wrote; delete score.json beside it to compute it again")
    rows = [parse_json(line) for line in lines]
    return {(row["problem"], row["index"]): row["scores"] for row in rows}
