"""Checkpoints that are whole or not there: `checkpoints/step-00000100/`.

The files are written under a temporary name, listed with size and sha256 in `MANIFEST.json` (last), synced, and
renamed. What a crash leaves behind is therefore either complete or has a name that nobody reads. Weights are
safetensors and the rest is JSON: reading a checkpoint never runs code from it. The directory is also a model directory
for `from_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from quietstar.errors import CheckpointError
from quietstar.model.adapter_files import check_base, read_adapters
from quietstar.model.adapters import has_adapters, load_trained_state, trained_state

FORMAT = 2
MANIFEST = "MANIFEST.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY_NAME = re.compile(r"step-\d{8,}\.(new|old)-\d+")


class SavesPretrained(Protocol):
    """A tokenizer, as far as a checkpoint cares."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Writes its files into a directory."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint will hold.

    Args:
        step: Optimizer steps done.
        model: Written by its `save_pretrained` if it is a transformers model, else as `model.safetensors`; with
            `weights` in place of its own.
        weights: By the model's names, all of them, or what is trained of a model with adapters. Tied weights are one
            tensor.
        optimizer: Flat tensors.
        state: The text of `state.json`.
        tokenizer: Written next to the model, so that the checkpoint can be used by itself.
    """

    step: int
    model: nn.Module
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: str
    tokenizer: SavesPretrained | None = None


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer: SavesPretrained | None = None,
    *,
    copy: bool = True,
) -> Snapshot:
    """What a checkpoint of this moment holds.

    Args:
        step: Optimizer steps done.
        model: See `Snapshot`.
        optimizer: Flat tensors.
        state: Plain JSON values; `format` and `step` are added.
        tokenizer: See `Snapshot`.
        copy: Copy all tensors to the CPU, so that training may go on while the snapshot is written.
    """
    copies: dict[int, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if copy else tensor.detach()
        return copies[id(tensor)]

    tensors = trained_state(model) if has_adapters(model) else model.state_dict(keep_vars=True)
    weights = {name: own(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1, allow_nan=False) + "\n"
    return Snapshot(step, model, weights, {name: own(tensor) for name, tensor in optimizer.items()}, text, tokenizer)


def save_checkpoint(directory: Path, snapshot: Snapshot) -> Path:
    """Writes one checkpoint. If anything fails, no file of an earlier one has been touched.

    Args:
        directory: The `checkpoints` directory of a run; made where it does not exist.
        snapshot: What to write. A checkpoint of the same step that is already there is replaced.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: It cannot be written, because the disk is full for instance.
        SafetensorError: The same, from the library that writes the tensors.
        CheckpointError: `directory` is a link.
    """
    refuse_link(directory)
    if not directory.exists():
        directory.mkdir(parents=True)
        _sync(directory.parent)
    final = directory / f"step-{snapshot.step:08d}"
    temporary = directory / f"{final.name}.new-{os.getpid()}"
    replaced = directory / f"{final.name}.old-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _save_model(snapshot.model, snapshot.weights, temporary)
        if snapshot.tokenizer is not None:
            snapshot.tokenizer.save_pretrained(str(temporary))
        save_file({name: tensor.contiguous() for name, tensor in snapshot.optimizer.items()}, temporary / OPTIMIZER)
        (temporary / STATE).write_text(snapshot.state, encoding="utf-8")
        files = {name: _describe(temporary / name) for name in _listing(temporary)}
        _write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        _sync(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
    return final


def refuse_link(directory: Path) -> None:
    """A run's checkpoints lie in the run's own directory: a link could make it read, and delete, anything.

    Raises:
        CheckpointError: `directory` is a link.
    """
    if directory.is_symlink():
        raise CheckpointError(f"{directory}: is a link; needs a directory of the run's own (or no such name yet)")


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named like a checkpoint, oldest first; nothing is read or verified. Links are not."""
    if not directory.is_dir():
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
    """The newest checkpoint that is whole. A damaged newer one is named in a warning and passed over.

    Args:
        directory: The `checkpoints` directory of a run.
        allow_partial: Take one, too, that lacks everything but its weights; what it lacks is named in a warning.

    Returns:
        Its path, or None where no checkpoint was ever written.

    Raises:
        CheckpointError: There are checkpoints and all are damaged; starting over silently would hide that. Or
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
        path: The checkpoint.
        allow_partial: `optimizer.safetensors` and `state.json` may be missing.

    Returns:
        Which of these two are missing; empty without `allow_partial`.

    Raises:
        CheckpointError: naming the first file that is missing, additional, or not as it was written.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: {MANIFEST} is missing")
    manifest = _read_json(manifest_path)
    expected = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(expected, dict):
        raise CheckpointError(f"{manifest_path}: not a manifest of format {FORMAT}")
    found = _listing(path)
    lacking = sorted({OPTIMIZER, STATE} - found) if allow_partial else []
    if missing := sorted(expected.keys() - found - set(lacking)):
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    if additional := sorted(found - expected.keys()):
        raise CheckpointError(f"{path}: {additional[0]} does not belong to it")
    if required := sorted({STATE, OPTIMIZER} - found - set(lacking)):
        raise CheckpointError(f"{path}: {required[0]} is missing")
    present = {name: description for name, description in sorted(expected.items()) if name in found}
    for name, description in present.items():
        size = (path / name).stat().st_size
        if not isinstance(description, dict) or size != description.get("size"):
            raise CheckpointError(f"{path}: {name} has {size} bytes, not those that were written")
    for name, description in present.items():
        if _describe(path / name) != description:
            raise CheckpointError(f"{path}: the content of {name} has changed since it was written")
    return lacking


def load_weights(model: nn.Module, path: Path) -> None:
    """Copies a checkpoint's weights into a model: all of them, and nothing else. Tied weights are stored once.

    Args:
        model: Of the same architecture; keeps its device.
        path: A checkpoint, already verified.

    Raises:
        CheckpointError: A tensor is missing, unknown, or has another shape or type; or the adapters are those of
            another base. The model is unchanged then.
    """
    if has_adapters(model):
        check_base(model, path)
        try:
            load_trained_state(model, read_adapters(path))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return
    stored: dict[str, Tensor] = {}
    for file in _weight_files(path):
        stored |= _load_tensors(file)
    own = model.state_dict(keep_vars=True)
    stored_by_identity = {id(own[name]): name for name in stored if name in own}
    source = {name: name if name in stored else stored_by_identity.get(id(tensor)) for name, tensor in own.items()}
    if missing := [name for name, stored_name in source.items() if stored_name is None]:
        raise CheckpointError(f"{path}: the model needs {missing[0]}, which the checkpoint does not have")
    if unknown := sorted(stored.keys() - own.keys()):
        raise CheckpointError(f"{path}: the model has no {unknown[0]}")
    for name, tensor in stored.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"the model needs {own[name].dtype} {list(own[name].shape)}"
            )
    model.load_state_dict(
        {name: stored[stored_name] for name, stored_name in source.items() if stored_name is not None}
    )


def load_optimizer_tensors(path: Path, *, allow_missing: bool = False) -> dict[str, Tensor] | None:
    """The optimizer's flat tensors of a verified checkpoint, on the CPU; None where they may be missing and are."""
    if allow_missing and not (path / OPTIMIZER).is_file():
        return None
    return _load_tensors(path / OPTIMIZER)


def load_state(path: Path, *, allow_missing: bool = False) -> dict[str, Any]:
    """The `state.json` of a verified checkpoint; only its step where it may be missing and is.

    Raises:
        CheckpointError: It is of another format.
    """
    if allow_missing and not (path / STATE).is_file():
        return {"step": int(path.name.removeprefix("step-"))}
    state = _read_json(path / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path / STATE}: format {state.get('format')}, this version reads format {FORMAT}")
    if state.get("step") != int(path.name.removeprefix("step-")):
        raise CheckpointError(f"{path / STATE}: is of step {state.get('step')}, the directory has another name")
    return state


def remove_old_checkpoints(directory: Path, *, keep: int, newest_step: int, best_step: int | None = None) -> None:
    """Keeps the newest `keep` checkpoints up to `newest_step` and that of `best_step`; removes what crashed saves left.

    Checkpoints of later steps are not counted: they are damaged ones that were passed over, and counting them would
    sooner or later remove the good one that training has just continued from. Nothing else is touched, and no link is
    followed.
    """
    if not directory.is_dir() or directory.is_symlink():
        return
    current = [(step, path) for step, path in list_checkpoints(directory) if step <= newest_step]
    old = [path for step, path in current[:-keep] if step != best_step]
    temporary = [path for path in directory.iterdir() if _TEMPORARY_NAME.fullmatch(path.name)]
    for path in [*old, *temporary]:
        shutil.rmtree(path, ignore_errors=True)  # which refuses to enter a link


def _save_model(model: nn.Module, weights: Mapping[str, Tensor], directory: Path) -> None:
    if not isinstance(model, PreTrainedModel):
        first_names: dict[int, str] = {}
        for name, tensor in weights.items():
            first_names.setdefault(id(tensor), name)
        save_file({name: weights[name].contiguous() for name in first_names.values()}, directory / WEIGHTS)
        return
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would break the training bar
    try:
        # the module's own names and not the hub's historic ones, so that loading needs no conversion
        model.save_pretrained(str(directory), state_dict=dict(weights), save_original_format=False)
    finally:
        if bar_was_on:
            transformers_logging.enable_progress_bar()


def _weight_files(path: Path) -> list[Path]:
    if not (path / WEIGHTS_INDEX).is_file():
        return [path / WEIGHTS]
    shards = sorted(set(_read_json(path / WEIGHTS_INDEX).get("weight_map", {}).values()))
    if outside := [shard for shard in shards if shard not in _listing(path)]:
        raise CheckpointError(f"{path / WEIGHTS_INDEX}: names {outside[0]}, which is not a file of the checkpoint")
    return [path / shard for shard in shards]


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None


def _listing(path: Path) -> set[str]:
    """Relative names of all files but the manifest. A link gets a name that no manifest has: it may lead anywhere."""
    names = set()
    for entry in path.rglob("*"):
        name = entry.relative_to(path).as_posix()
        if entry.is_symlink():
            names.add(f"{name} (a link)")
        elif entry.is_file() and name != MANIFEST:
            names.add(name)
    return names


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: needs a JSON object")
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
