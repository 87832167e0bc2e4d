"""`python -m quietstar.generate`: continue texts with a model that thinks before each token."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.config.command_line import parse_config, run_command
from quietstar.inference.commands import GENERATE, generate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(lambda: generate(parse_config(GENERATE, argv)))


if __name__ == "__main__":
    sys.exit(main())
