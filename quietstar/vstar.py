"""`python -m quietstar.vstar`: the same with a verifier; without arguments, the embedded default."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from quietstar.config.command_line import Command, parse_config, run_command
from quietstar.config.loops import OuterLoopConfig, validate_loop
from quietstar.config.presets import VSTAR_DESCRIPTIONS, VSTAR_PRESETS
from quietstar.outer_loop.command import run


def _preset(given: Mapping[str, Any]) -> str:
    return "routes" if given.get("model.path") is None else "plain"


VSTAR = Command(OuterLoopConfig, VSTAR_PRESETS, VSTAR_DESCRIPTIONS, _preset, validate_loop)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        run(parse_config(VSTAR, argv, "python -m quietstar.vstar"), with_verifier=True)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
