"""Reading what a run has written so far, and what the run of a checkpoint says about the checkpoint.

The run may still be going, or may have died in the middle of a line.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quietstar.config.options import path_kind
from quietstar.config.parsing import check_type, parse_json, parse_yaml
from quietstar.errors import DataError
from quietstar.runs.files import CONFIG, ENVIRONMENT, EVENTS, METRICS, SAMPLES

_SAMPLES_NAME = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True)
class RunDirectory:
    """A run's files as plain values.

    Args:
        name: Name of the directory.
        config: Options of the run, nested as in `config.yaml`; empty where it cannot be read.
        lines: Lines of `metrics.jsonl`: `step`, `split` and numbers, null as NaN.
        events: Lines of `events.jsonl`: `step`, `event` and `message`.
        samples: Step and samples of the first and the last file in `samples/`; one entry where there is one file.
        environment: Entries of `environment.json`, one for each start of the run.
    """

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    environment: list[dict[str, Any]] = field(default_factory=list)


def read_run(directory: Path) -> RunDirectory:
    """Reads a run directory; a file that is missing, and a line that is not whole, count as not written.

    Raises:
        DataError: It is not a run directory: neither `config.yaml` nor `metrics.jsonl` is there.
    """
    found = path_kind(directory, "run_directory")
    if found is None or not any((directory / name).is_file() for name in (CONFIG, METRICS)):
        raise DataError(f"{directory}: has neither config.yaml nor metrics.jsonl; needs the output_dir of a run")
    lines = [
        {key: math.nan if value is None else value for key, value in line.items()}
        for line in _json_lines(directory / METRICS)
        if is_metrics_line(line)
    ]
    last = int(lines[-1]["step"]) if lines else 0
    environment = _json(directory / ENVIRONMENT)
    return RunDirectory(
        name=directory.resolve().name,
        config=_config(directory / CONFIG),
        lines=lines,
        events=[
            line
            for line in _json_lines(directory / EVENTS)
            if isinstance(line.get("step"), int) and isinstance(line.get("event"), str)
        ],
        samples=_first_and_last_samples(directory / SAMPLES, last),
        environment=[entry for entry in environment if isinstance(entry, dict)]
        if isinstance(environment, list)
        else [],
    )


def is_metrics_line(line: object) -> bool:
    """Returns whether a value is a line of `metrics.jsonl`: a step, a split, and numbers or null."""
    if not isinstance(line, dict) or not isinstance(line.get("split"), str):
        return False
    try:
        check_type(line.get("step"), int, "step")
        check_type({key: value for key, value in line.items() if key != "split"}, dict[str, float | None], "line")
    except DataError:
        return False
    return True


def _config(path: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(path.read_bytes(), path.name)
    except (OSError, DataError):
        return {}
    return config if isinstance(config, dict) else {}


def _first_and_last_samples(directory: Path, last_step: int) -> list[tuple[int, list[dict[str, Any]]]]:
    found = {}
    for path in directory.glob("step-*.json"):
        if (match := _SAMPLES_NAME.fullmatch(path.name)) and int(match[1]) <= last_step:
            found[int(match[1])] = path  # later ones belong to a part of the run that is being repeated
    steps = sorted(found)
    ends = steps[:1] + steps[-1:] if len(steps) > 1 else steps
    read = [(step, _json(found[step])) for step in ends]
    return [
        (step, [one for one in content["samples"] if isinstance(one, dict) and isinstance(one.get("text", 0), int)])
        for step, content in read
        if isinstance(content, dict) and isinstance(content.get("samples"), list)
    ]


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes(), surrogates=True)
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    lines = []
    for line in raw.split(b"\n"):
        try:
            content = parse_json(line, surrogates=True)
        except ValueError:
            continue
        if isinstance(content, dict):
            lines.append(content)
    return lines


def run_of(checkpoint: Path) -> Path | None:
    """Returns the directory of the training run that a checkpoint lies in, or None."""
    if path_kind(checkpoint, "checkpoint") is None:
        return None
    # unresolved where possible, so that printed paths are as the user wrote them
    place = (checkpoint if checkpoint.parent.name == "checkpoints" else checkpoint.resolve()).parent
    return place.parent if place.name == "checkpoints" and (place.parent / CONFIG).is_file() else None


def model_name(checkpoint: Path) -> str:
    """Returns the name of a model for a report: not a path of this machine, but a hub name as it is."""
    run = run_of(checkpoint)
    if run is not None:
        return f"{run.resolve().name}, {checkpoint.resolve().name}"
    return checkpoint.resolve().name if path_kind(checkpoint, "checkpoint") == "directory" else str(checkpoint)


def training_length(checkpoint: Path) -> int | None:
    """Returns the number of tokens in the texts that a checkpoint was trained on; None where no run says so."""
    run = run_of(checkpoint)
    if run is None:
        return None
    try:
        length = _config(run / CONFIG)["data"]["length"]
    except (TypeError, KeyError):
        return None
    return length if isinstance(length, int) and not isinstance(length, bool) else None
