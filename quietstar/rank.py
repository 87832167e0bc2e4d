"""`python -m quietstar.rank`: put candidate solutions in order, by a verifier or by votes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.verifiers.ranking import RANK, rank_file

        rank_file(parse_config(RANK, argv))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
