"""`python -m quietstar.gate`: fit a thinking gate, so that a model thinks only where it pays."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.inference.commands import GATE, write_gate

        write_gate(parse_config(GATE, argv))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
