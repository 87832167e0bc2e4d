"""`python -m quietstar.report RUN_DIRECTORY`: write `report.html` again, from the files of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quietstar.config.command_line import run_command
from quietstar.errors import ConfigError
from quietstar.reporting.any_report import write_any_report

USAGE = """usage: python -m quietstar.report RUN_DIRECTORY

Writes report.html into the directory of a training run, finished or not, of a run of STaR or V-STaR, or of a
comparison of such runs: one file that needs no network."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0

    def command() -> None:
        if len(arguments) != 1:
            raise ConfigError(f"report: got {len(arguments)} arguments, needs one: the output_dir of a run")
        print(write_any_report(Path(arguments[0])))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
