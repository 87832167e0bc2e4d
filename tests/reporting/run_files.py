"""Run directories with made-up numbers, in the files that a run writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietstar.config.command_line import to_yaml
from quietstar.config.commands import parse_train_config

HOSTILE = (
    "</script><script>hacked=1</script><img src=x onerror=hacked=1>&\x00\x07\x1b\u202eevil\u202c\u200b\ud800\ufeff"
)
"""What a thought may hold: markup, controls, a bidi override, a zero-width space, half a surrogate pair."""
LOOKAHEAD = 2


def measurements(step: int) -> dict[str, float | None]:
    """Plausible numbers of a run that learns to think."""
    learned = 1 - math.exp(-step / 40)
    values: dict[str, float | None] = {}
    for j in range(LOOKAHEAD):
        base, gain = 2.6 + 0.1 * j, 0.1 * learned * (1 - 0.2 * j)
        values |= {f"base_nll_{j}": base, f"talk_nll_{j}": base - gain, f"gain_{j}": gain}
    return values | {
        "loss": 2.6 - learned,
        "text_nll": 2.7,
        "base_nll": 2.65,
        "talk_nll": 2.65 - 0.09 * learned,
        "gain": 0.09 * learned,
        "reward": 0.18 * learned,
        "reward_size": 0.2 + 0.1 * learned,
        "advantage_size": 0.15,
        "mixing_weight": 0.1 + 0.2 * learned,
        "mixing_weight_square": (0.1 + 0.2 * learned) ** 2 + 0.01,
        "thought_entropy": 3 - learned,
        "thought_logprob": -3 + learned,
    }


def lines(steps: int, evaluate_every: int = 10) -> list[dict[str, Any]]:
    """`metrics.jsonl` of a run."""
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            train = {"gradient_norm": 1.5, "thought_embedding_gradient_norm": 9.0, "policy_loss": 0.1}
            train |= {"learning_rate": 1e-5, "tokens_per_second": 900.0, "seconds": 2.0 * step}
            found.append({"step": step, "split": "train", **measurements(step), **train})
        if step % evaluate_every == 0:
            held_out = {"gradient_norm_lm": 0.8, "gradient_norm_policy": 120.0, "mixing_weight_deviation": 0.1}
            held_out |= {f"gain_decile_{index}": 0.01 * index * step for index in range(10)}
            found.append({"step": step, "split": "eval", **measurements(step), **held_out, "seconds": 2.0 * step})
    return found


def samples(step: int, count: int = 14) -> list[dict[str, Any]]:
    """Thoughts at the same places, other ones at each step; the most rewarded one is hostile."""
    return [
        {
            "text": place % 3,
            "position": 7 * place,
            "before": f"text before place {place} ",
            "thought": HOSTILE if place == 3 else f"thought {place} of step {step}",
            "after": f" text after place {place}",
            "reward": 5.0 if place == 3 else place / 10 - 0.5,
            "mixing_weight": 0.25,
            "base_nll": 2.0,
            "talk_nll": None if place == 5 else 1.5,
        }
        for place in range(count)
    ]


ENVIRONMENT = {
    "started": "2030-01-01T00:00:00+00:00",
    "command": "python -m quietstar.train --data.path '<b>.txt'",
    "python": "3.11.9",
    "platform": "Linux",
    "packages": {"torch": "2.13.0"},
    "cpu": "A CPU",
    "cores": 2,
    "memory_gib": 7.8,
    "devices": ["NVIDIA H200"],
    "cuda": "13.0",
    "git": {"commit": "abc123", "dirty": True},
}


def write_run(directory: Path, metrics: list[dict[str, Any]], **config: object) -> Path:
    """A run directory with a configuration and metrics."""
    directory.mkdir(parents=True, exist_ok=True)
    given = {"model.path": "some/model", "data.path": "text.txt", "output_dir": str(directory), **config}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    (directory / "config.yaml").write_text(to_yaml(parse_train_config(arguments)))
    write_lines(directory / "metrics.jsonl", metrics)
    return directory


def write_lines(path: Path, content: list[Mapping[str, Any]] | list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in content))


def write_full_run(directory: Path, steps: int = 40) -> Path:
    """Everything that a run may leave behind."""
    from quietstar.training.run import write_samples

    write_run(directory, lines(steps), **{"training.learning_rate": 3e-5, "training.steps": steps})
    for step in (0, steps):
        write_samples(directory, step, samples(step))
    events = [("resumed", "from step-00000010"), ("skipped", f"loss is nan {HOSTILE}"), ("out_of_memory", "halved")]
    write_lines(
        directory / "events.jsonl",
        [
            {"time": 1.0, "step": 5 * (index + 1), "event": event, "message": text}
            for index, (event, text) in enumerate(events)
        ],
    )
    (directory / "environment.json").write_text(json.dumps([ENVIRONMENT, ENVIRONMENT | {"cpu": "Another CPU"}]))
    return directory
