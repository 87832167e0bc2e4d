"""`python -m quietstar.star`: improve a model from its own rationales; without arguments, the embedded default."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from quietstar.config.command_line import Command, parse_config, run_command
from quietstar.config.loops import OuterLoopConfig, validate_loop
from quietstar.config.presets import STAR_DESCRIPTIONS, STAR_PRESETS
from quietstar.outer_loop.command import run


def _preset(given: Mapping[str, Any]) -> str:
    return "addition" if given.get("model.path") is None else "plain"


STAR = Command(OuterLoopConfig, STAR_PRESETS, STAR_DESCRIPTIONS, _preset, validate_loop)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        run(parse_config(STAR, argv, "python -m quietstar.star"), with_verifier=False)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
