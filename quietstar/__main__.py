"""The `quietstar` command: `quietstar train ...` is the same as `python -m quietstar.train ...`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from quietstar import __version__
from quietstar.errors import ConfigError, run_command

COMMANDS = {
    "train": "teach a language model to think, or run the embedded default",
    "star": "improve a model from its own rationales (STaR), or run the embedded default",
    "vstar": "do the same as star and train a verifier (V-STaR), or run its embedded default",
    "generate": "continue texts with a model that thinks before each token",
    "evaluate": "measure a model with and without its thoughts, on tasks and on text",
    "view": "write a page that shows what a model thinks at each token of a text",
    "gate": "fit a gate, so that a model thinks only where it pays",
    "rank": "rank candidate solutions with a verifier",
    "compare": "run several presets of star and vstar on one task, and draw one figure",
    "plan": "print what a training run would need: memory, operations, time",
    "report": "write report.html for a run directory again",
    "sweep": "try variations of the embedded default over seeds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command with the arguments that follow its name; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        status: int = import_module(f"quietstar.{name}").main(arguments[1:])
        return status
    return run_command(lambda: _answer(name))


def _answer(name: str) -> None:
    """Prints what is asked about the program, or refuses a name that is no command's."""
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        print(f"quietstar {__version__}")
    else:
        closest = difflib.get_close_matches(name, COMMANDS, n=1)
        problem = f"unknown command {name!r}" if name else "no command"
        suggestion = f"did you mean {closest[0]}?" if closest else "--help lists the commands"
        raise ConfigError(f"{problem}; {suggestion}")


def _usage() -> str:
    lines = [f"  quietstar {name:10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: quietstar COMMAND [--KEY VALUE ...]", "", *lines, "", "quietstar COMMAND --help: its options"]
    )


if __name__ == "__main__":
    sys.exit(main())
