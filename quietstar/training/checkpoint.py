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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from quietstar.config.parsing import parse_json
from quietstar.errors import CheckpointError
from quietstar.model.adapters import check_base, has_adapters, load_trained_state, read_adapters, trained_state
from quietstar.model.sharding import Rows, gathered_dtype, own_part, own_rows, whole
from quietstar.runs.checkpoints import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    SHARDS,
    STATE,
    describe,
    listing,
    refuse_link,
    remove_old_checkpoints,
)
from quietstar.runs.directory import INDEX, read_index
from quietstar.runs.files import saving
from quietstar.training.ranks import ALONE, Ranks

WEIGHTS = "model.safetensors"
ROWS = "rows"
"""Key, in a file of the optimizer's state, of the rows that it has of sharded tensors: JSON, `Rows` by name."""


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
        rows: Rows that this rank holds of the tensors of the optimizer's state that belong to sharded parameters.
    """

    step: int
    model: nn.Module
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: str
    tokenizer: SavesPretrained | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer: SavesPretrained | None = None,
    *,
    rows: Mapping[str, Rows] | None = None,
    copy: bool = True,
) -> Snapshot:
    """Takes a snapshot of the present state of training.

    Args:
        step: Number of optimizer steps done.
        model: Model whose weights are saved.
        optimizer: Flat tensors of the optimizer's state, by name.
        state: Plain JSON values for `state.json`; `format` and `step` are added.
        tokenizer: Tokenizer that is saved next to the model; None saves none.
        rows: Rows that this rank holds of the tensors of the optimizer's state that belong to sharded parameters.
        copy: Whether to copy all tensors to the CPU, so that training can continue while the snapshot is written.
    """
    copies: dict[int, Tensor] = {}
    dtype = getattr(model, "gathered_dtype", None)

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            if isinstance(tensor, DTensor):  # every rank gathers it, and the first keeps it
                gathered = whole(tensor).detach()
                kept = gathered.to("cpu", dtype, copy=True) if dist.get_rank() == 0 else gathered.new_empty(0)
                copies[id(tensor)] = kept
            else:
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if copy else tensor.detach()
        return copies[id(tensor)]

    tensors = trained_state(model) if has_adapters(model) else model.state_dict(keep_vars=True)
    weights = {name: own(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1, allow_nan=False) + "\n"
    parts = {name: own(tensor) for name, tensor in optimizer.items()}
    return Snapshot(step, model, weights, parts, text, tokenizer, rows or {})


def save_checkpoint(directory: Path, snapshot: Snapshot, ranks: Ranks = ALONE) -> Path:
    """Writes one checkpoint. If anything fails, no file of an earlier one has been touched.

    Of several ranks each writes its part of the optimizer's state, and the first everything else, the manifest last.

    Args:
        directory: Directory `checkpoints` of a run, made where it does not exist.
        snapshot: Snapshot to write. An existing checkpoint of the same step is replaced.
        ranks: Processes of the run.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: The checkpoint cannot be written, for example because the disk is full.
        CheckpointError: `directory` is a link.
    """
    final = directory / f"step-{snapshot.step:08d}"
    process = ranks.leaders(os.getpid())
    temporary = directory / f"{final.name}.new-{process}"
    replaced = directory / f"{final.name}.old-{process}"

    def prepare() -> None:
        refuse_link(directory)
        if not directory.exists():
            directory.mkdir(parents=True)
            _sync(directory.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if ranks.size > 1:
            (temporary / SHARDS).mkdir()

    def write() -> dict[str, Any]:
        if not ranks.holds_a_first_copy:
            return {}
        with saving(temporary):
            if ranks.leads:
                _save_model(snapshot.model, snapshot.weights, temporary)
                if snapshot.tokenizer is not None:
                    snapshot.tokenizer.save_pretrained(str(temporary))
                (temporary / STATE).write_text(snapshot.state, encoding="utf-8")
            tensors = {name: tensor.contiguous() for name, tensor in snapshot.optimizer.items()}
            name = OPTIMIZER if ranks.size == 1 else f"{SHARDS}/shard-{ranks.rank:05d}.safetensors"
            save_file(tensors, temporary / name, {ROWS: json.dumps(snapshot.rows)} if snapshot.rows else None)
        if ranks.size > 1:  # by the machine that has written it
            _sync(temporary / name)
        return {name: describe(temporary / name)}

    def finish() -> None:
        shards = {name: description for part in written for name, description in part.items()}
        files = {name: shards.get(name) or describe(temporary / name) for name in sorted(listing(temporary))}
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

    ranks.together(prepare, of_the_first=True)
    try:
        written = ranks.together(write)
        ranks.together(finish, of_the_first=True)
    finally:
        if ranks.leads:
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
    own = model.state_dict(keep_vars=True)
    rows = {name: own_rows(tensor) for name, tensor in own.items() if isinstance(tensor, DTensor)}
    stored: dict[str, Tensor] = {}
    for file in _weight_files(path):
        stored |= _load_tensors(file, rows)
    stored_by_identity = {id(own[name]): name for name in stored if name in own}
    source = {name: name if name in stored else stored_by_identity.get(id(tensor)) for name, tensor in own.items()}
    if missing := [name for name, stored_name in source.items() if stored_name is None]:
        raise CheckpointError(f"{path}: the model needs {missing[0]}, which the checkpoint does not have")
    if unknown := sorted(stored.keys() - own.keys()):
        raise CheckpointError(f"{path}: the model has no {unknown[0]}")
    for name, tensor in stored.items():
        wanted = own_part(own[name]).shape, gathered_dtype(model, own[name])
        if (tensor.shape, tensor.dtype) != wanted:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, the model needs {wanted[1]} {list(wanted[0])}"
            )
    with torch.no_grad():
        for name, tensor in stored.items():
            own_part(own[name]).copy_(tensor)


def load_optimizer_tensors(
    path: Path, rows: Mapping[str, Rows], *, allow_missing: bool = False
) -> dict[str, Tensor] | None:
    """Loads the optimizer's flat tensors of a verified checkpoint to the CPU, whatever number of ranks wrote it.

    None where the files are missing and `allow_missing` is set.

    Args:
        path: Directory of the checkpoint.
        rows: Rows to load of those tensors that this rank holds a part of.
        allow_missing: Whether there may be none.
    """
    files = [path / OPTIMIZER] if (path / OPTIMIZER).is_file() else sorted((path / SHARDS).glob("shard-*.safetensors"))
    if allow_missing and not files:
        return None
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    needed: dict[str, int] = {}
    for file in files or [path / OPTIMIZER]:
        with _opened(file) as content:
            written = _rows_in(file, (content.metadata() or {}).get(ROWS, "{}"))
            for name in content.keys():  # noqa: SIM118 (it is no dict)
                tensor = content.get_slice(name)
                if name not in written:
                    tensors[name] = _part(file, content, name, rows)
                    continue
                begin, end, total = written[name]
                first, stop, wanted = rows.get(name, (0, total, total))
                if tensor.get_shape()[:1] != [end - begin] or total != wanted:
                    raise CheckpointError(
                        f"{file}: {name} has rows {begin} to {end} of {total}, in {tensor.get_shape()}; needs those of "
                        f"{wanted}"
                    )
                low, high = max(begin, first), min(end, stop)
                part = tensor[low - begin : high - begin] if low < high else tensor[:0]
                parts.setdefault(name, []).append((low, part))
                needed[name] = first
    for name, found in parts.items():
        found = sorted((place for place in found if len(place[1])), key=itemgetter(0)) or found[:1]
        for low, part in found:
            if (len(part) and low != needed[name]) or part.shape[1:] != found[0][1].shape[1:]:
                raise CheckpointError(f"{path / SHARDS}: the rows of {name} do not follow one another")
            needed[name] += len(part)
        tensors[name] = torch.cat([part for _, part in found])
    return tensors


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


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None


def _load_tensors(file: Path, rows: Mapping[str, Rows]) -> dict[str, Tensor]:
    with _opened(file) as content:
        return {name: _part(file, content, name, rows) for name in content.keys()}  # noqa: SIM118 (it is no dict)


def _part(file: Path, content: Any, name: str, rows: Mapping[str, Rows]) -> Tensor:
    """Returns the rows of a tensor that this rank holds; all of one that is not sharded."""
    if name not in rows:
        tensor: Tensor = content.get_tensor(name)
        return tensor
    first, stop, total = rows[name]
    stored = content.get_slice(name)
    if stored.get_shape()[:1] != [total]:
        raise CheckpointError(f"{file}: {name} has the shape {stored.get_shape()}, the model needs {total} rows")
    part: Tensor = stored[first:stop]
    return part


def _rows_in(file: Path, text: str) -> dict[str, Rows]:
    try:
        rows = {name: (int(first), int(stop), int(total)) for name, (first, stop, total) in parse_json(text).items()}
        if not all(0 <= first <= stop <= total for first, stop, total in rows.values()):
            raise ValueError("rows begin and end in the tensor")
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {ROWS}: cannot be read ({error})") from None
    return rows


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
        ranks: Processes of the run.
    """

    def __init__(self, directory: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self._directory = directory
        self._keep = keep
        self._ranks = ranks
        self._apart = ranks.for_a_thread()
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
        if self._thread is None or self._ranks.total(torch.tensor(float(self._thread.is_alive()))) > 0:
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
            self._written = save_checkpoint(self._directory, snapshot, self._apart)

            def remove() -> None:
                remove_old_checkpoints(self._directory, keep=self._keep, newest_step=snapshot.step, best_step=best_step)

            self._apart.together(remove, of_the_first=True)
        except BaseException as error:  # passed to the training thread, which decides
            self._error = error
