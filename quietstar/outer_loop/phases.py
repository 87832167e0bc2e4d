"""Phases of a loop: each is done once, is identified by its inputs, and can be started again at any moment."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quietstar.config.parsing import check_type, read_json_file
from quietstar.errors import CheckpointError
from quietstar.runs.files import EventLog, changed_options, write_json

LOOP_VERSION = 1
"""Version of what the phases compute: a run of another version is not continued."""


class Phases:
    """The phases of a run, each with a manifest `iteration-NN/PHASE.json` of its inputs and outputs.

    Manifests hold no times and no paths outside the run: two runs of the same command have equal ones.

    Args:
        directory: Directory of the run.
        events: Log that gets a line when a phase begins and when it ends.
        redo: Whether to do a phase with changed inputs again, instead of refusing to continue.
        tell: Function called with each line of progress.
    """

    def __init__(self, directory: Path, events: EventLog, redo: bool, tell: Callable[[str], None]) -> None:
        self.directory = directory
        self._events = events
        self._redo = redo
        self._tell = tell
        self._outputs: dict[tuple[int, str], dict[str, Any]] = {}

    def directory_of(self, iteration: int) -> Path:
        """Returns the directory of an iteration."""
        return self.directory / f"iteration-{iteration:02d}"

    def run(
        self, iteration: int, name: str, inputs: Mapping[str, Any], work: Callable[[str], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Does a phase unless it has been done, and returns its outputs.

        Args:
            iteration: Number of the iteration that the phase belongs to.
            name: Name of the phase.
            inputs: Plain JSON values that decide the outputs.
            work: Function that does the phase, given the key of its inputs, and returns its outputs as plain JSON
                values.

        Raises:
            CheckpointError: The phase was done with other inputs.
        """
        file = self.directory_of(iteration) / f"{name}.json"
        inputs = {"loop.version": LOOP_VERSION, **inputs}
        key = key_of({"phase": name, "iteration": iteration, **inputs})
        done = _read(file)
        if done is not None and done.get("key") == key:
            found = _Outputs(file, done["outputs"])
            self._outputs[iteration, name] = found
            return found.copy()
        if done is not None and not self._redo:
            changed = changed_options(done.get("inputs", {}), inputs)
            raise CheckpointError(
                f"{file.parent}: {name} was done with other inputs: {'; '.join(changed)}. Set it back, choose another "
                "--output_dir, or do such phases again with --loop.redo (samples that still fit are kept)"
            )
        self._events.write(iteration, f"{name} started", key)
        self._tell(f"iteration {iteration}: {name.replace('_', ' ')}")
        started = time.monotonic()
        outputs = dict(work(key))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"phase": name, "iteration": iteration, "key": key, "inputs": inputs, "outputs": outputs})
        self._events.write(iteration, f"{name} finished", f"{time.monotonic() - started:.1f} s")
        self._outputs[iteration, name] = dict(outputs)
        return outputs

    def outputs(self, iteration: int, name: str) -> dict[str, Any] | None:
        """Returns the outputs of a phase for which `run` was called here; None for another, even if an earlier run did
        it.
        """
        return self._outputs.get((iteration, name))


def key_of(values: Mapping[str, Any]) -> str:
    """Returns a short hash of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


class _Outputs(dict[str, Any]):
    """Outputs of a phase that an earlier run did; one that is missing is told with its file."""

    def __init__(self, file: Path, outputs: Mapping[str, Any]) -> None:
        super().__init__(outputs)
        self._file = file

    def __missing__(self, name: str) -> Any:
        raise CheckpointError(f"{self._file}: outputs.{name} is missing; delete the file, and its phase is done again")

    def copy(self) -> _Outputs:
        return _Outputs(self._file, self)


@dataclass(frozen=True)
class _Hashes:
    """The outputs that later phases read; the others are only shown."""

    key: str = ""
    sha256: str = ""
    model_sha256: str = ""


@dataclass(frozen=True)
class _Manifest:
    """What the manifest of a phase holds besides its name."""

    outputs: _Hashes
    key: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = read_json_file(file)
        check_type(content, _Manifest, "manifest")
        return dict(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); delete it, and its phase is done again") from None
