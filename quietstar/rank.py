"""`python -m quietstar.rank`: put candidate solutions in order, by a verifier or by votes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.config.command_line import parse_config, run_command
from quietstar.verifiers.ranking import RANK, rank_file


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(lambda: rank_file(parse_config(RANK, argv)))


if __name__ == "__main__":
    sys.exit(main())
