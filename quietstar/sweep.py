"""`python -m quietstar.sweep`: vary the options of the embedded default, one at a time, over a few seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.demos.options import SWEEP, make_sweep
        from quietstar.runs.machine import set_up

        sweep = make_sweep(parse_config(SWEEP, argv))
        set_up(sweep.default.config.training)
        from quietstar.demos.sweep import run_sweep

        run_sweep(sweep)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
