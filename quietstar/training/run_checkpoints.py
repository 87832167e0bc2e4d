"""The checkpoints of one run: saves them while training continues, keeps the best, and finds them again."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from quietstar.config.training import TrainingOptions
from quietstar.errors import CheckpointError
from quietstar.model.adapters import has_adapters, trained_state
from quietstar.runs.checkpoints import latest_checkpoint, list_checkpoints, refuse_link
from quietstar.runs.files import EventLog
from quietstar.runs.machine import available_memory, is_out_of_memory
from quietstar.training.checkpoint import CheckpointSaver, SavesPretrained, Snapshot, take_snapshot
from quietstar.training.optimizer import MasterAdamW
from quietstar.training.ranks import ALONE, Ranks

NO_BEST: dict[str, Any] = {"step": None, "loss": None}


class ExtraState(Protocol):
    """Something besides the model that learns, such as a running baseline: its state is in the model's checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class RunCheckpoints:
    """Saves at most one checkpoint at a time, keeps the newest and the best, and applies `on_save_failure`.

    Args:
        run_directory: Directory of the run; checkpoints lie in its `checkpoints/`.
        model: Model that is saved.
        tokenizer: Tokenizer that is saved with the model; None saves none.
        options: Options of the training loop.
        events: Event log of the run.
        ranks: Processes of the run.

    Attributes:
        newest: Path of the newest checkpoint that is whole; None where there is none yet.
        saved_step: Step of the checkpoint that was saved or begun last; 0 after a failure, so that saving is tried
            again.
        best: Step and loss of the best evaluated step that has a checkpoint, as plain JSON values.
    """

    def __init__(
        self,
        run_directory: Path,
        model: nn.Module,
        tokenizer: SavesPretrained | None,
        options: TrainingOptions,
        events: EventLog,
        ranks: Ranks = ALONE,
    ) -> None:
        self.directory = run_directory / "checkpoints"
        self.newest: Path | None = None
        self.saved_step = 0
        self.best = NO_BEST
        self._best_before = NO_BEST
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        self._events = events
        self._ranks = ranks
        self._saver = CheckpointSaver(self.directory, options.keep_checkpoints, ranks)

    def find(self) -> Path | None:
        """Finds the checkpoint to resume from; None to start from the beginning.

        Raises:
            CheckpointError: All are damaged, there are some although `resume` is off, or the directory is a link.
        """
        if self._options.resume:
            return self.newest_whole(allow_partial=self._options.allow_partial)
        refuse_link(self.directory)
        if found := list_checkpoints(self.directory):
            raise CheckpointError(
                f"{self.directory.parent}: has checkpoints already (the newest is {found[-1][1].name}), and "
                "training.resume is off. Choose another output_dir, or delete this one"
            )
        return None

    def newest_whole(self, allow_partial: bool = False) -> Path | None:
        """Returns the newest checkpoint that is whole, which the first rank looks for; None where there is none.

        Raises:
            CheckpointError: All are damaged, or the directory is a link.
        """

        def find() -> str | None:
            path = latest_checkpoint(self.directory, allow_partial=allow_partial)
            return None if path is None else str(path)

        found = self._ranks.together(find, of_the_first=True)[0]
        return None if found is None else Path(found)

    def continue_from(self, path: Path, step: int, best: Mapping[str, Any]) -> None:
        """Notes that the checkpoint of this step has been loaded."""
        self.newest, self.saved_step, self.best = path, step, dict(best)

    def save(
        self,
        step: int,
        loss: float,
        optimizer: MasterAdamW,
        state: Callable[[], Mapping[str, Any]],
        before_writing: Callable[[], None],
        must_succeed: bool = False,
    ) -> None:
        """Begins to write a checkpoint; waits only for the one before and for a copy of the tensors.

        Args:
            step: Number of optimizer steps done.
            loss: Loss of the evaluation of this step; NaN where there was none.
            optimizer: Optimizer whose state is copied.
            state: Function that returns plain JSON values for `state.json`, called when `best` is up to date.
            before_writing: Function that writes what the checkpoint relies on; an error of it counts as one of saving.
            must_succeed: Whether to raise even where `on_save_failure` is `continue`.

        Raises:
            CheckpointError: This checkpoint or the one before could not be written.
        """
        self.wait()  # before the copy, so that there is never more than one
        self._best_before = self.best
        if loss < (math.inf if self.best["loss"] is None else self.best["loss"]):
            self.best = {"step": step, "loss": loss}
        snapshot, copied = self._take_snapshot(step, optimizer, state())
        self.saved_step = step
        try:
            self._ranks.together(before_writing, of_the_first=True)
            self._saver.start(snapshot, self.best["step"] if self._options.keep_best else None)
        except Exception as error:
            self._failed(error, must_succeed)
        if not copied:
            self.wait(must_succeed)

    def look(self) -> None:
        """Notes whether the checkpoint that is being written is finished; does not wait."""
        self._note(self._saver.finished, must_succeed=False)

    def wait(self, must_succeed: bool = False) -> None:
        """Waits for the checkpoint that is being written.

        Raises:
            CheckpointError: It could not be written, and `on_save_failure` is `stop` or `must_succeed` is set.
        """
        self._note(self._saver.wait, must_succeed)

    def check_room(self) -> None:
        """Warns if the future checkpoints will not fit on the disk."""
        if not self._ranks.leads:
            return
        size = self._size()
        # one more than is kept, because an old one is removed only after the new one is whole
        count = self._options.keep_checkpoints + 1 + self._options.keep_best - len(list_checkpoints(self.directory))
        free = shutil.disk_usage(self.directory.parent).free
        if free < size * max(1, count):
            warnings.warn(
                f"output_dir: {self.directory.parent} has {free / 2**30:.1f} GiB left for {max(1, count)} checkpoints "
                f"of about {size / 2**30:.1f} GiB; make room, or lower training.keep_checkpoints",
                stacklevel=2,
            )

    def _take_snapshot(self, step: int, optimizer: MasterAdamW, state: Mapping[str, Any]) -> tuple[Snapshot, bool]:
        """Returns a snapshot, and whether it is a copy.

        Without memory for a copy it holds the tensors themselves, which must not change until it is written.
        """
        parts = step, self._model, optimizer.state_tensors(), state, self._tokenizer
        rows = optimizer.state_rows()
        available = available_memory()
        lacking = available is not None and self._size() >= available
        lacking = bool(self._ranks.total(torch.tensor(float(lacking))) > 0)
        if not lacking:  # Linux kills a process that takes more, without an error
            try:
                return take_snapshot(*parts, rows=rows), True
            except (RuntimeError, MemoryError) as error:
                if self._ranks.size > 1 or not is_out_of_memory(error):  # the others are in the middle of theirs
                    raise
        message = f"step {step}: no memory for a copy of the checkpoint; training waits until it is written"
        self._events.write(step, "not_copied", message)
        warnings.warn(message, stacklevel=2)
        return take_snapshot(*parts, rows=rows, copy=False), False

    def _note(self, result: Callable[[], Path | None], must_succeed: bool) -> None:
        try:
            self.newest = result() or self.newest
        except Exception as error:
            self._failed(error, must_succeed)

    def _failed(self, error: Exception, must_succeed: bool) -> None:
        step = self.saved_step
        message = (
            f"{self.directory}: the checkpoint of step {step} could not be written ({error}); "
            f"the older ones are unchanged, the newest is {self.newest or 'none'}"
        )
        self.saved_step = 0
        if self.best["step"] == step:  # the best one before must not be removed for one that does not exist
            self.best = self._best_before
        self._events.write(step, "save_failed", message)
        if must_succeed or self._options.on_save_failure == "stop":
            raise CheckpointError(
                f"{message}. Make room and start again to resume; training.on_save_failure continue runs on without it"
            ) from None
        warnings.warn(message, stacklevel=2)

    def _size(self) -> int:
        """Estimates the size of a checkpoint in bytes."""
        saved = trained_state(self._model).values() if has_adapters(self._model) else self._model.parameters()
        size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                # two moments in float32, and a float32 copy of parameters with fewer bits
                size += parameter.numel() * (12 if parameter.element_size() < 4 else 8)
        return size
