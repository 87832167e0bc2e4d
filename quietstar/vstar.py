"""`python -m quietstar.vstar`: STaR with a verifier (V-STaR); without arguments, the embedded default."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.config.commands import VSTAR
        from quietstar.outer_loop.command import run_loop

        run_loop(parse_config(VSTAR, argv), with_verifier=True)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
