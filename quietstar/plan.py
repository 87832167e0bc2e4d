"""`python -m quietstar.plan`: print what a training run will need, before any weight is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from quietstar.config.command_line import narrowed, parse_config, run_command
from quietstar.config.commands import PLAN, PlanConfig
from quietstar.config.options import check_model_path
from quietstar.config.training import TrainConfig
from quietstar.errors import ConfigError
from quietstar.planning.gpus import find_gpu, gpu_here


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(lambda: plan(parse_config(PLAN, argv)))


def plan(config: PlanConfig) -> None:
    """Prints the plan, and writes it to the file `json` if one is named.

    Raises:
        ConfigError: The GPU or the model does not exist, or the file cannot be written.
    """
    gpu = None if config.gpu is None else find_gpu(config.gpu)
    if config.model.path is not None:
        check_model_path(config.model.path)
    if config.gpu is None:
        gpu = gpu_here(config.training.device)
    from quietstar.planning.plan import make_plan, plan_text  # after everything that can be refused without torch

    made = make_plan(narrowed(TrainConfig, config), gpu)
    print(plan_text(made))
    if config.gpu is None and gpu is None:
        print("\nplanned for this machine's CPU; --gpu NAME plans for a GPU")
    if config.json is not None:
        try:
            Path(config.json).write_text(json.dumps(made.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"json: cannot write {config.json}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
