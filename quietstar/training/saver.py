"""Saving checkpoints behind the back of training: it waits for a copy of the tensors and for nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

from quietstar.training.checkpoint import Snapshot, save_checkpoint
from quietstar.training.whole_checkpoints import remove_old_checkpoints


class CheckpointSaver:
    """Writes snapshots in a thread, one at a time and in order, and removes old checkpoints after each.

    Args:
        directory: The `checkpoints` directory of a run.
        keep: How many of the newest checkpoints stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: Path | None = None

    def start(self, snapshot: Snapshot, best_step: int | None) -> None:
        """Begins to write; waits for the one before.

        Args:
            snapshot: A copy; nobody changes it from here on.
            best_step: Step of an older checkpoint that stays, too.

        Raises:
            Exception: What the one before has failed with.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot, best_step), name="checkpoint")
        self._thread.start()

    def finished(self) -> Path | None:
        """The checkpoint that has been written since the last call, if any; does not wait.

        Raises:
            Exception: What writing it has failed with.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """As `finished`, but waits for the one that is being written."""
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
        except BaseException as error:  # handed to the training thread, which decides
            self._error = error
