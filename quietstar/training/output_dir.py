"""What a run writes beside its checkpoints, and whether what is there already comes from the same options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietstar.files import write_whole


def write_json(file: Path, value: Any) -> None:
    """Write plain values to a file that is whole or as before, even if the process dies."""
    write_whole(file, json.dumps(value, indent=1) + "\n")


def append_json(file: Path, value: Any) -> None:
    """Add one value to the list in a file, which is whole or as before; what is no list there is begun anew."""
    try:
        before = json.loads(file.read_bytes())
    except (OSError, ValueError):
        before = []
    write_json(file, [*(before if isinstance(before, list) else []), value])


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A phrase with the old and the new value for each dotted key whose values differ; a missing one counts as None."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
