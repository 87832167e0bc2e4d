"""`python -m quietstar.view CHECKPOINT --text FILE`: write a page of what a model thinks at each token of a text."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.inference.commands import VIEW, view

        view(parse_config(VIEW, argv))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
