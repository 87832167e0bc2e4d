"""What a step takes and computes: bytes by kind, with their peak, and operations by part of the step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What one operation does.

    Args:
        flops: Of its matrix products and attention, two for a multiplication and its addition.
        bytes: Read and written.
        dtype: Of what it multiplies.
    """

    flops: int
    bytes: int
    dtype: torch.dtype


@dataclass
class Ledger:
    """Counts storages from the first tensor that has them until the last one is gone.

    Attributes:
        kind: What memory that is taken now is for.
        part: The part of the step that is running.
        place: Where in it.
        alive: Bytes by kind.
        peaks: By part and place, `alive` when most bytes were alive there.
        largest: The most bytes of each kind, each at its own time.
        work: How often each part did which operation.
    """

    kind: str = "other"
    part: str = "other"
    place: str = ""
    alive: Counter[str] = field(default_factory=Counter)
    peaks: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    largest: Counter[str] = field(default_factory=Counter)
    work: dict[str, Counter[Work]] = field(default_factory=dict)
    _storages: dict[int, tuple[str, int]] = field(default_factory=dict)
    _total: int = 0
    _most: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes alive."""
        return self._total

    def restart(self) -> None:
        """Forgets peaks and work, not what is alive."""
        self.peaks, self._most, self.work, self.largest = {}, {}, {}, self.alive.copy()

    @contextmanager
    def labelled(self, kind: str | None = None, part: str | None = None) -> Iterator[None]:
        """Within the block memory is taken for `kind`, and `part` is running; None: what it was."""
        before = self.kind, self.part
        self.kind, self.part = kind or self.kind, part or self.part
        try:
            yield
        finally:
            self.kind, self.part = before

    def take(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._storages:
            self._storages[key] = self.kind, size
            weakref.finalize(storage, self._free, key).atexit = False
            self._add(self.kind, size)

    def borrow(self, size: int) -> None:
        """Counts bytes that an operation has taken and given back already."""
        self._add(self.kind, size)
        self._add(self.kind, -size)

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """From now on the tensor's storage is for `kind`."""
        key = tensor.untyped_storage()._cdata
        before, size = self._storages.get(key, (kind, 0))
        if before != kind:
            self._storages[key] = kind, size
            self._add(before, -size)
            self._add(kind, size)

    def compute(self, work: Work) -> None:
        """Notes an operation."""
        self.work.setdefault(self.part, Counter())[work] += 1

    def _free(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.alive[kind] += size
        self._total += size
        if self.alive[kind] > self.largest[kind]:
            self.largest[kind] = self.alive[kind]
        here = self.part, self.place
        if self._total > self._most.get(here, 0):
            self._most[here] = self._total
            self.peaks[here] = self.alive.copy()
