"""`python -m quietstar.evaluate CHECKPOINT`: what thinking is worth, on problems, on a text, and in lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.config.command_line import parse_config, run_command
from quietstar.evaluation.command import evaluate_checkpoint
from quietstar.evaluation.settings import EVALUATE


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(lambda: evaluate_checkpoint(parse_config(EVALUATE, argv)))


if __name__ == "__main__":
    sys.exit(main())
