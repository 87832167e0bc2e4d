"""`python -m quietstar.sweep`: what the options of the embedded default do, each varied by itself over a few seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.config.command_line import parse_train_config, run_command
from quietstar.config.values import set_up
from quietstar.demos.variations import GRID, make_sweep, option_value
from quietstar.errors import ConfigError

PROGRAM = "python -m quietstar.sweep"
DEFAULTS = {"output_dir": "runs/sweep", "textbook.seeds": "3", "training.report": "false"}
"""In place of a training run's defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        vary, words = _take_vary(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help"} & set(words):
            print(_usage())
            parse_train_config(words, PROGRAM)
        sweep = make_sweep(_with_defaults(words), vary)
        set_up(sweep.default.config.training.threads)
        from quietstar.demos.sweep import run_sweep

        run_sweep(sweep)

    try:
        return run_command(command)
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command goes on", file=sys.stderr)
        return 130


def _take_vary(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words after each `--vary`, and the arguments of a training run."""
    vary: list[str] = []
    words: list[str] = []
    taking = False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == "--vary":
            taking = True
            vary += [value] if equals else []
        elif taking and not word.startswith("--"):
            vary.append(word)
        else:
            taking = False
            words.append(word)
    if "--vary" in argv and not vary:
        raise ConfigError("vary: got no value, needs names of options, or NAME=VALUE,VALUE")
    return vary, words


def _with_defaults(words: Sequence[str]) -> list[str]:
    """Adds a sweep's defaults where no flag is given, and where a file leaves the default of a training run."""
    given = {word.removeprefix("--").partition("=")[0] for word in words}
    config, standard = parse_train_config([word for word in words if word != "--print_config"]), parse_train_config([])
    return [
        *words,
        *(
            f"--{key}={value}"
            for key, value in DEFAULTS.items()
            if key not in given and option_value(config, key) == option_value(standard, key)
        ),
    ]


def _usage() -> str:
    grid = "\n".join(f"  {key:28}{values.replace(',', ', ')}" for key, values in GRID.items())
    defaults = ", ".join(f"--{key} {value}" for key, value in DEFAULTS.items())
    return f"""usage: {PROGRAM} [--vary NAME,NAME | NAME=VALUE,VALUE ...] [arguments of a training run]

Trains the embedded default over several seeds, and once more for each other value of an option, all else being equal.
Writes results.md, results.json and sweep.svg. The same command goes on where it was stopped.

--vary takes names of options, dotted or their last part, for these values:
{grid}
or values of any option: --vary thought_length=4,8 training.learning_rate=1e-4,5e-4
Without --vary, all of the above. {defaults} unless given.

A training run's arguments hold for every variation:
"""


if __name__ == "__main__":
    sys.exit(main())
