"""`python -m quietstar.report RUN_DIRECTORY`: write `report.html` again, from the files of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.reporting.comparison_report import REPORT_COMMAND, write_any_report

        print(write_any_report(parse_config(REPORT_COMMAND, argv).run_directory))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
