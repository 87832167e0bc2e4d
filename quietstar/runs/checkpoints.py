"""Finding and verifying the checkpoints of a run: bytes are compared with manifests, and no tensor is made of them.

`latest_checkpoint` is read first; `differences` says whether a checkpoint belongs to the run that wants to continue
from it. `quietstar.training.checkpoint` writes checkpoints and loads the tensors.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quietstar.config.options import check_model_path, check_weights_format, path_kind
from quietstar.config.parsing import check_type, read_json_file, shown
from quietstar.config.training import TrainingOptions
from quietstar.errors import CheckpointError, ConfigError, DataError
from quietstar.runs.files import changed_options

FORMAT = 2
MANIFEST = "MANIFEST.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
SHARDS = "training"
"""Directory of the optimizer's state in a checkpoint that several ranks have written: a file of each."""

# A change of any other option in the middle of a run would give a run of neither the old nor the new options.
# `steps` may change, so that a run can be extended: the schedule then follows the new number.
MAY_CHANGE = frozenset(
    {"steps", "micro_batch_size", "reuse_sampling_pass", "replay", "fused_layers", "eval_every", "eval_batches"}
    | {"save_every", "keep_checkpoints", "keep_best", "on_save_failure", "on_non_finite", "max_non_finite"}
    | {"on_out_of_memory", "log_every", "log_to", "report", "device", "threads", "deterministic"}
    | {"resume", "override", "allow_partial"}
)

_NAME = re.compile(r"step-(\d{8,})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEMPORARY_NAME = re.compile(r"step-\d{8,}\.(new|old)-\d+")


@dataclass(frozen=True)
class _Identity:
    """What `identity` returns, as it is read again."""

    options: dict[str, Any]
    run_options: dict[str, Any] | None
    data: dict[str, Any]
    has_extra_state: bool


@dataclass(frozen=True)
class _Best:
    step: int | None
    loss: float | None


@dataclass(frozen=True)
class _State:
    """What `state.json` holds; the classes that read `position`, `record` and `extra` check these."""

    format: int
    step: int
    run: _Identity | None = None
    position: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    best: _Best | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class _File:
    size: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    format: int
    files: dict[str, _File]


def refuse_link(directory: Path) -> None:
    """Checks that the `checkpoints` directory of a run is not a link, which could make the run read or delete anything.

    Raises:
        CheckpointError: `directory` is a link.
    """
    if os.path.islink(directory):
        raise CheckpointError(f"{directory}: is a link; needs a directory of the run's own (or no such name yet)")


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Lists (step, path) of everything named like a checkpoint, oldest first, without reading it. Links are skipped."""
    if path_kind(directory, "checkpoint") != "directory":
        return []
    found = []
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_symlink():
            warnings.warn(f"{path}: is a link, which is not followed; a checkpoint has to lie here", stacklevel=2)
        elif match and path.is_dir():
            found.append((match, path))
    return sorted((int(match[1]), path) for match, path in found)


def latest_checkpoint(directory: Path | str, *, allow_partial: bool = False) -> Path | None:
    """Finds the newest checkpoint that is whole. A damaged newer one is named in a warning and skipped.

    Args:
        directory: Directory `checkpoints` of a run.
        allow_partial: Whether to accept a checkpoint with only the weights; what it lacks is named in a warning.

    Returns:
        Path of the checkpoint, or None where there is no checkpoint.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged: starting over silently would hide that. Or
            `directory` is a link.
    """
    directory = Path(directory)
    refuse_link(directory)
    problems = []
    for _, path in reversed(list_checkpoints(directory)):
        try:
            lacking = verify_checkpoint(path, allow_partial=allow_partial)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"passing over a damaged checkpoint: {problem}; using {path}", stacklevel=2)
        if lacking:
            warnings.warn(f"{path}: without {' and '.join(lacking)}, which start afresh", stacklevel=2)
        return path
    if problems:
        raise CheckpointError(
            f"{directory}: no checkpoint is whole ({'; '.join(problems)}). Restore one from a backup, or choose "
            "another output_dir to start over; with --training.allow_partial true the weights alone are enough"
        )
    return None


def verify_checkpoint(path: Path, *, allow_partial: bool = False) -> list[str]:
    """Reads every byte of a checkpoint and compares it with its manifest.

    Args:
        path: Directory of the checkpoint.
        allow_partial: Whether the optimizer's state, `optimizer.safetensors` or `training/`, and `state.json` may be
            missing.

    Returns:
        The names of these that are missing; empty without `allow_partial`.

    Raises:
        CheckpointError: The checkpoint is damaged; the message names the first file that is missing, additional, or
            not as it was written.
    """
    expected = _read_manifest(path)
    found = listing(path)
    shards = {name for name in expected if PurePosixPath(name).parts[:1] == (SHARDS,)}
    needed = {STATE} if shards else {OPTIMIZER, STATE}
    lacking = sorted(needed - found) if allow_partial else []
    if allow_partial and shards and not shards & found:
        lacking.append(SHARDS)
    missing = sorted(expected.keys() - found - set(lacking) - (shards if SHARDS in lacking else set()))
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    if additional := sorted(found - expected.keys()):
        raise CheckpointError(f"{path}: {additional[0]} does not belong to it")
    if required := sorted(needed - found - set(lacking)):
        raise CheckpointError(f"{path}: {required[0]} is missing")
    present = {name: description for name, description in sorted(expected.items()) if name in found}
    try:
        for name, description in present.items():
            size = (path / name).stat().st_size
            if size != description["size"]:
                raise CheckpointError(f"{path}: {name} has {size} bytes, not those that were written")
        for name, description in present.items():
            if describe(path / name) != description:
                raise CheckpointError(f"{path}: the content of {name} has changed since it was written")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return lacking


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the size and the hash of each file of a checkpoint, by its name in it."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path}: {MANIFEST} is missing")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a manifest of format {FORMAT}")
    _check_type(manifest, _Manifest, file)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, description in files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or name != str(place) or not name.isprintable():
            raise CheckpointError(f"{file}: files: got the name {shown(name)}, needs that of a file of the checkpoint")
        if description["size"] < 0:
            raise CheckpointError(f"{file}: files.{name}.size: got {shown(description['size'])}, needs at least 0")
        if not _SHA256.fullmatch(description["sha256"]):
            raise CheckpointError(
                f"{file}: files.{name}.sha256: got {shown(description['sha256'])}, needs 64 hexadecimal digits"
            )
    return files


def _check_type(value: object, hint: Any, file: Path) -> None:
    try:
        check_type(value, hint, file.stem)
    except DataError as error:
        raise CheckpointError(f"{file}: {error}") from None


def checkpoint_directory(path: str | os.PathLike[str]) -> str:
    """Returns the path of a model: the newest whole checkpoint where `path` is a training run, else `path` itself.

    Raises:
        ConfigError: `path` is neither a directory nor a hub name, or a directory that holds neither a model nor a run.
        CheckpointError: The run has no checkpoint, or only damaged ones.
    """
    check_model_path(path, "checkpoint")
    directory = Path(path)
    check_weights_format(path, "checkpoint")
    if not directory.is_dir() or (directory / "config.json").is_file():
        return os.fspath(path)
    if not (directory / "checkpoints").is_dir():
        raise ConfigError(f"{path}: neither a model directory (it has no config.json) nor that of a training run")
    newest = latest_checkpoint(directory / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{path}: the run has no checkpoint yet")
    return os.fspath(newest)


def load_state(path: Path, *, allow_missing: bool = False) -> dict[str, Any]:
    """Reads the `state.json` of a verified checkpoint.

    With `allow_missing` a checkpoint without the file gives a state with nothing but the step.

    Raises:
        CheckpointError: The file cannot be read, has another format, or is of another step than the directory's name.
    """
    if allow_missing and not (path / STATE).is_file():
        return {"step": int(path.name.removeprefix("step-"))}
    state = read_json(path / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / STATE}: format {shown(state.get('format'))}, this version reads format {FORMAT}"
        )
    _check_type(state, _State, path / STATE)
    if state["step"] != int(path.name.removeprefix("step-")):
        raise CheckpointError(f"{path / STATE}: is of step {state['step']}, the directory has another name")
    return state


def remove_old_checkpoints(directory: Path, *, keep: int, newest_step: int, best_step: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints up to `newest_step` and that of `best_step`, and what crashes left.

    Checkpoints of later steps are not counted: they are damaged ones that were skipped, and counting them would sooner
    or later remove the good one that training has just continued from. Nothing else is touched, and no link is
    followed.
    """
    if not directory.is_dir() or directory.is_symlink():
        return
    current = [(step, path) for step, path in list_checkpoints(directory) if step <= newest_step]
    old = [path for step, path in current[:-keep] if step != best_step]
    temporary = [path for path in directory.iterdir() if _TEMPORARY_NAME.fullmatch(path.name)]
    for path in [*old, *temporary]:
        shutil.rmtree(path, ignore_errors=True)  # which refuses to enter a link


def listing(path: Path) -> set[str]:
    """Returns the relative names of all files but the manifest.

    A link gets a name that no manifest has, because it may lead anywhere.
    """
    names = set()
    for entry in path.rglob("*"):
        name = entry.relative_to(path).as_posix()
        if entry.is_symlink():
            names.add(f"{name} (a link)")
        elif entry.is_file() and name != MANIFEST:
            names.add(name)
    return names


def describe(path: Path) -> dict[str, Any]:
    """Returns `size` and `sha256` of a file, as a manifest has them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        CheckpointError: The file cannot be read, or does not hold a JSON object.
    """
    try:
        value = read_json_file(path)
    except (OSError, DataError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: needs a JSON object")
    return value


def identity(
    options: TrainingOptions, run_options: Mapping[str, Any] | None, data: Mapping[str, Any], has_extra_state: bool
) -> dict[str, Any]:
    """Returns what identifies a run in its checkpoints, as plain JSON values.

    Args:
        options: Options of the training loop.
        run_options: Other options that decide what is trained, by dotted key; None where the run does not name them.
        data: Fingerprint of the training data.
        has_extra_state: Whether something besides the model learns.
    """
    return {
        "options": asdict(options),
        "run_options": None if run_options is None else dict(run_options),
        "data": dict(data),
        "has_extra_state": has_extra_state,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for each difference between the `identity` of two runs that makes them different runs."""
    changed = changed_options(_fixed(before["options"]), _fixed(now["options"]))
    if (before["run_options"] is None) != (now["run_options"] is None):
        changed.append("one says what its model and objective are and the other does not")
    else:
        changed += changed_options(before["run_options"] or {}, now["run_options"] or {})
    data = {f"the training data's {key}": value for key, value in before["data"].items()}
    changed += changed_options(data, {f"the training data's {key}": value for key, value in now["data"].items()})
    if before["has_extra_state"] != now["has_extra_state"]:
        changed.append("one has extra state and the other has not")
    return changed


def _fixed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {f"training.{name}": value for name, value in options.items() if name not in MAY_CHANGE}
