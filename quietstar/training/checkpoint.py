"""Writing and loading checkpoints, which are whole or not there: `checkpoints/step-00000100/`.

The files are written under a temporary name, listed with size and sha256 in `MANIFEST.json` (last), synced, and
renamed. So what a crash leaves is either complete or has a name that is never read. Weights are safetensors and the
rest is JSON: reading a checkpoint never runs code from it. The directory is also a model directory for
`from_pretrained`.

`take_snapshot` copies what a checkpoint holds; `CheckpointSaver` writes it in a thread, so that training waits only for
the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
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
from quietstar.model.adapters import check_base, has_adapters, load_trained_state, read_adapters, trained_state
from quietstar.runs.checkpoints import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    STATE,
    describe,
    listing,
    refuse_link,
    remove_old_checkpoints,
)
from quietstar.runs.directory import INDEX, read_index
from quietstar.runs.files import saving

WEIGHTS = "model.safetensors"


class SavesPretrained(Protocol):
    """The part of a tokenizer that a checkpoint needs."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Writes the files of the tokenizer into a directory."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint will hold.

    Args:
        step: Number of optimizer steps done.
        model: Model to write, with `weights` in place of its own: by its `save_pretrained` if it is a transformers
            model, else as `model.safetensors`.
        weights: Weights by their names in the model: all of them, or the trained ones of a model with adapters. Tied
            weights are one tensor.
        optimizer: Flat tensors of the optimizer's state, by name.
        state: Text of `state.json`, which the checkpoint is resumed from.
        tokenizer: Tokenizer that is written next to the model, so that the checkpoint can be used alone.
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
    """Takes a snapshot of the present state of training.

    Args:
        step: Number of optimizer steps done.
        model: Model whose weights are saved.
        optimizer: Flat tensors of the optimizer's state, by name.
        state: Plain JSON values for `state.json`; `format` and `step` are added.
        tokenizer: Tokenizer that is saved next to the model; None saves none.
        copy: Whether to copy all tensors to the CPU, so that training can continue while the snapshot is written.
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
        directory: Directory `checkpoints` of a run, made where it does not exist.
        snapshot: Snapshot to write. An existing checkpoint of the same step is replaced.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: The checkpoint cannot be written, for example because the disk is full.
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
        with saving(temporary):
            _save_model(snapshot.model, snapshot.weights, temporary)
            if snapshot.tokenizer is not None:
                snapshot.tokenizer.save_pretrained(str(temporary))
            save_file({name: tensor.contiguous() for name, tensor in snapshot.optimizer.items()}, temporary / OPTIMIZER)
        (temporary / STATE).write_text(snapshot.state, encoding="utf-8")
        files = {name: describe(temporary / name) for name in listing(temporary)}
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


def load_weights(model: nn.Module, path: Path) -> None:
    """Copies a checkpoint's weights into a model: all of them, and nothing else. Tied weights are stored once.

    Args:
        model: Model of the same architecture, on any device.
        path: Directory of a checkpoint that has been verified.

    Raises:
        CheckpointError: A tensor is missing, unknown, or has another shape or dtype; or the adapters are those of
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
    """Loads the optimizer's flat tensors of a verified checkpoint to the CPU.

    None where the file is missing and `allow_missing` is set.
    """
    if allow_missing and not (path / OPTIMIZER).is_file():
        return None
    return _load_tensors(path / OPTIMIZER)


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
        # the module's own names, not the old ones of the hub, so that loading needs no conversion
        model.save_pretrained(str(directory), state_dict=dict(weights), save_original_format=False)
    finally:
        if bar_was_on:
            transformers_logging.enable_progress_bar()


def _weight_files(path: Path) -> list[Path]:
    if not (path / INDEX).is_file():
        return [path / WEIGHTS]
    return [path / shard for shard in read_index(path)]


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointSaver:
    """Writes snapshots in a thread, one at a time and in order, and removes old checkpoints after each.

    Args:
        directory: Directory `checkpoints` of a run.
        keep: Number of newest checkpoints to keep.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: Path | None = None

    def start(self, snapshot: Snapshot, best_step: int | None) -> None:
        """Begins to write a checkpoint, after waiting for the one before.

        Args:
            snapshot: Snapshot to write, which must not change until it is written.
            best_step: Step of an older checkpoint to keep, too; None: there is none.

        Raises:
            Exception: The error of the checkpoint before, which could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot, best_step), name="checkpoint")
        self._thread.start()

    def finished(self) -> Path | None:
        """Returns the checkpoint that has been written since the last call, or None; does not wait.

        Raises:
            Exception: The error of a checkpoint that could not be written.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Waits for the checkpoint that is being written; otherwise the same as `finished`."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        written, self._written = self._written, None
        if error is not None:
            raise error
        return written

    def _write(self, snapshot: Snapshot, best_step: int | None) -> None:
        try:
            self._written = save_checkpoint(self._directory, snapshot)
            remove_old_checkpoints(self._directory, keep=self._keep, newest_step=snapshot.step, best_step=best_step)
        except BaseException as error:  # passed to the training thread, which decides
            self._error = error
