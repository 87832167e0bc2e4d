"""`python -m quietstar.evaluate CHECKPOINT`: measure a model with and without thoughts: problems, text, lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.evaluation.command import evaluate_checkpoint
        from quietstar.evaluation.settings import EVALUATE

        evaluate_checkpoint(parse_config(EVALUATE, argv))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
