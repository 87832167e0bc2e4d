"""`python -m quietstar.sweep`: vary the options of the embedded default, one at a time, over a few seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.config.command_line import parse_config, run_command
from quietstar.demos.options import SWEEP, make_sweep
from quietstar.runs.machine import set_up


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        sweep = make_sweep(parse_config(SWEEP, argv))
        set_up(sweep.default.config.training.threads)
        from quietstar.demos.sweep import run_sweep

        run_sweep(sweep)

    try:
        return run_command(command)
    except KeyboardInterrupt:
        print("\nstopped; finished work is kept, and the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
