"""V-STaR killed with -9 in every phase, again and again, ends as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.launch import Zygote
from tests.outer_loop.loops import VERIFIER, arguments, manifests, rows, store_lines

PHASES = [
    *((0, name) for name in ("base", "train", "evaluate", "verify_evaluate")),
    *((1, name) for name in ("sample", "verify_sample", "rationalize", "verify_rationalize", "build", "train")),
    *((1, name) for name in ("evaluate", "verify_evaluate", "verifier_dpo", "verifier_likelihood", "verifier_orm")),
    *((1, name) for name in ("candidates", "verify_candidates", "score", "measure")),
]


def phases_begun(run: Path) -> list[tuple[int, str]]:
    """In the order in which they began, again and again."""
    events = [(line["step"], line["event"].partition(" ")) for line in rows(run / "events.jsonl")]
    return [(iteration, name) for iteration, (name, _, what) in events if what == "started"]


def samples(run: Path) -> list[str]:
    """All samples of the store, sorted: only a batch that is cut in two changes their order."""
    return sorted(json.dumps(line, sort_keys=True) for line in store_lines(run))


def verdicts(run: Path) -> set[str]:
    """All verdicts; those that were lost before their phase was done are given again."""
    return {json.dumps(line, sort_keys=True) for line in store_lines(run, "verdict")}


@pytest.mark.slow
def test_killed_in_every_phase(adder: Path, zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(adder, run, VERIFIER, loop__rationalize="true")
    in_the_middle: dict[tuple[int, str], tuple[Any, ...]] = {
        (1, "sample"): ("on_store_write", 2, "SIGKILL"),  # one batch is stored, and a half
        (1, "verify_sample"): ("on_store_write", 1, "SIGKILL"),
        (1, "train"): ("kill_after_checkpoint", str(run / "iteration-01/train/checkpoints"), 4),
        (1, "verifier_dpo"): ("kill_after_checkpoint", str(run / "verifiers/dpo/run/checkpoints"), 3),
    }
    for iteration, name in PHASES:
        zygote.run(command, ("kill_in_phase", name, iteration, "start"), expect=-9)
        if (iteration, name) in in_the_middle:
            zygote.run(command, in_the_middle[iteration, name], expect=-9)
        zygote.run(command, ("kill_in_phase", name, iteration, "end"), expect=-9)
    text = zygote.run(command)
    assert "Traceback" not in text

    assert phases_begun(whole) == PHASES
    assert list(dict.fromkeys(phases_begun(run))) == PHASES
    assert manifests(run) == manifests(whole) and len(manifests(run)) == len(PHASES)
    for file in ("iteration-01/kept.jsonl", "iteration-01/scores.jsonl", "summary.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    for file in (path.relative_to(whole) for path in whole.glob("**/model/*.safetensors")):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert samples(run) == samples(whole) and len(set(samples(run))) == len(samples(run))
    assert verdicts(run) == verdicts(whole)
