"""What happens to a row of the data that cannot be used."""

from __future__ import annotations

import warnings
from typing import Literal

from quietstar.errors import DataError

SHOWN = 20
"""Skipped rows that are told one by one; the others are counted."""


class BadRow(Exception):
    """Why a row cannot be used, without saying where it is: whoever reads the rows knows that.

    Args:
        reason: In words.
        line: The line, from 0, where there are several.
    """

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


class BadRows:
    """Stops at the first row that cannot be used, or skips it, up to a number of them.

    Args:
        policy: `stop` or `skip`.
        limit: So many rows may be skipped.

    Attributes:
        count: Rows skipped so far.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", limit: int = 100) -> None:
        self._policy = policy
        self._limit = limit
        self.count = 0

    def report(self, place: str, reason: str) -> None:
        """Takes note of a row.

        Args:
            place: `file` or `file:line`.
            reason: Why it cannot be used.

        Raises:
            DataError: The policy is to stop, or it is one row too many.
        """
        message = f"{place}: {reason}"
        if self._policy == "stop":
            raise DataError(message)
        self.count += 1
        if self.count > self._limit:
            raise DataError(
                f"{self.count} rows cannot be used, more than data.max_bad_rows allows ({self._limit}); "
                f"the last one is {message}"
            )
        if self.count <= SHOWN:
            last = "; further ones are counted without a message" if self.count == SHOWN else ""
            warnings.warn(f"{message} (row skipped{last})", stacklevel=2)
