"""`python -m quietstar.plan`: print what a training run will need, before any weight is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        import json
        from pathlib import Path

        from quietstar.config.command_line import narrowed, parse_config
        from quietstar.config.commands import PLAN
        from quietstar.config.options import check_model_path
        from quietstar.config.training import TrainConfig
        from quietstar.errors import ConfigError
        from quietstar.planning.gpus import find_gpu, gpu_here
        from quietstar.runs.files import write_whole

        config = parse_config(PLAN, argv)
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
                write_whole(Path(config.json), json.dumps(made.as_dict(), indent=2) + "\n")
            except OSError as error:
                raise ConfigError(f"json: cannot write {config.json}: {error.strerror}") from error

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
