"""`python -m quietstar.compare`: several presets of STaR and V-STaR on one task and model, drawn in one figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quietstar.config.command_line import parse_config, run_command, take_options
from quietstar.config.presets import STAR_PRESETS, VSTAR_PRESETS
from quietstar.config.values import set_up
from quietstar.errors import ConfigError
from quietstar.outer_loop.inputs import Arm, at_budget, load_problems
from quietstar.star import STAR
from quietstar.vstar import VSTAR

PROGRAM = "python -m quietstar.compare"
USAGE = f"""usage: {PROGRAM} --presets NAME,NAME,... [--budget N] --model.path MODEL [--KEY VALUE ...]

Runs each preset in a directory of its own below output_dir, and draws them together: held-out accuracy against
iterations and against completions sampled. What is finished is kept: the same command goes on.

  --presets    of quietstar.star: {", ".join(STAR_PRESETS)};
               of quietstar.vstar: {", ".join(name for name in VSTAR_PRESETS if name not in STAR_PRESETS)}
  --budget     completions of each training problem in all, shared out over a preset's iterations; greedy
               presets keep theirs
  --KEY VALUE  any option of python -m quietstar.star --help, for all of them"""
OWN = ("presets", "budget")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0

    def command() -> None:
        arms, out, budget = read_arms(arguments)
        for arm in arms.values():
            load_problems(arm.config, arm.with_verifier)
        if next(iter(arms.values())).config.dry_run:
            from quietstar.outer_loop.run import describe

            for name, arm in arms.items():
                print(f"== {name}")
                describe(arm.config)
            return
        set_up(next(iter(arms.values())).config.training.threads)
        from quietstar.outer_loop.comparison import run_arms

        run_arms(arms, out, budget)
        print(f"report: {out / 'report.html'}")

    return run_command(command)


def read_arms(arguments: Sequence[str]) -> tuple[dict[str, Arm], Path, int | None]:
    """The runs that a command line asks for, the directory of all, and the budget.

    Raises:
        ConfigError: An option or a preset is unknown or cannot be used.
    """
    own, rest = take_options(arguments, OWN)
    names = [name.strip() for name in own.get("presets", "").split(",") if name.strip()]
    if not names:
        raise ConfigError(f"presets: missing; needs names with commas, such as {','.join(list(STAR_PRESETS)[2:5])}")
    if len(set(names)) < len(names):
        raise ConfigError(f"presets: got {own['presets']!r}, which names one twice")
    budget = _budget(own["budget"]) if "budget" in own else None
    arms: dict[str, Arm] = {}
    out = Path("runs/compare")
    for name in names:
        verifies = name in VSTAR_PRESETS and name not in STAR_PRESETS
        config = parse_config(VSTAR if verifies else STAR, ["--preset", name, "--output_dir", str(out), *rest], PROGRAM)
        out = Path(config.output_dir)
        config.output_dir = str(out / name)
        if budget is not None:
            config = at_budget(config, budget)
        arms[name] = Arm(config, verifies)
    return arms, out, budget


def _budget(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"budget: got {text!r}, needs a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
