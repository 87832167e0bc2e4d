"""What the training run that a checkpoint comes from says about it."""

from __future__ import annotations

from pathlib import Path

import yaml


def run_of(checkpoint: Path) -> Path | None:
    """The directory of the training run that a checkpoint lies in, or None."""
    # unresolved where that is enough, so that the paths that are printed are the user's own
    place = (checkpoint if checkpoint.parent.name == "checkpoints" else checkpoint.resolve()).parent
    return place.parent if place.name == "checkpoints" and (place.parent / "config.yaml").is_file() else None


def model_name(checkpoint: Path) -> str:
    """What a page calls a model: no path of this machine, but a name on the hub whole."""
    run = run_of(checkpoint)
    if run is not None:
        return f"{run.resolve().name}, {checkpoint.resolve().name}"
    return checkpoint.resolve().name if checkpoint.is_dir() else str(checkpoint)


def training_length(checkpoint: Path) -> int | None:
    """Tokens of the texts that a checkpoint was trained on, where its run says so."""
    run = run_of(checkpoint)
    if run is None:
        return None
    try:
        length = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["length"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return length if isinstance(length, int) else None
