"""How far an evaluation is: a bar on a terminal, a line for each part elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def counted(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Counts items on stderr; says nothing where there are none to do.

    Args:
        name: What is done.
        total: How many items there are.
    """
    if not total:
        yield lambda done: None
        return
    start = time.perf_counter()
    terminal = sys.stderr.isatty()
    with tqdm(total=total, desc=name, leave=False, disable=not terminal, file=sys.stderr) as bar:
        yield bar.update
    print(f"{name}: {total:,} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def so_far(name: str) -> Iterator[Callable[[int, int], None]]:
    """The same for what is told how many of how many items are done, each time."""
    start = time.perf_counter()
    with tqdm(desc=name, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
