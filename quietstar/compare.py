"""`python -m quietstar.compare`: run several presets of STaR and V-STaR on one task and model, and draw one figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        from quietstar.config.command_line import parse_config
        from quietstar.config.commands import COMPARE, of_preset
        from quietstar.outer_loop.command import compare

        config = parse_config(COMPARE, argv)
        compare(config, {name: parse_config(of_preset(name), argv) for name in config.presets})

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
