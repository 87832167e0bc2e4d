"""`python -m quietstar.plan`: what a training run will take, from its arguments, before any weight is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from quietstar.config.command_line import parse_train_config, run_command, take_options
from quietstar.config.training import TrainConfig
from quietstar.config.values import check_model_path
from quietstar.errors import ConfigError
from quietstar.planning.gpus import GPUS, find_gpu, gpu_here

PROGRAM = "python -m quietstar.plan"
OWN = {
    "gpu": f"What to plan for: {', '.join(GPUS)}, or cpu. By default the GPU of this machine, or else its CPU.",
    "json": "Write the plan to this file too: bytes, FLOPs and seconds.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        own, rest = take_options(sys.argv[1:] if argv is None else argv, OWN)
        if "--help" in rest or "-h" in rest:
            lines = [f"  --{name} {name.upper()}\n      {text}" for name, text in OWN.items()]
            print("\n".join(["what a training run will take; besides the arguments of the training:", *lines, ""]))
        config = _read(rest)
        name = own.get("gpu")
        gpu = None if name is None else find_gpu(name)
        if config.model.path is not None:
            check_model_path(config.model.path)
        if name is None:
            gpu = gpu_here(config.training.device)
        from quietstar.planning.plan import (
            make_plan,  # after all that can be refused before torch comes
            plan_text,
        )

        plan = make_plan(config, gpu)
        print(plan_text(plan))
        if name is None and gpu is None:
            print("\nplanned for this machine's CPU; --gpu NAME plans for a GPU")
        if "json" in own:
            _write(Path(own["json"]), json.dumps(plan.as_dict(), indent=2) + "\n")

    return run_command(command)


def _read(arguments: Sequence[str]) -> TrainConfig:
    """The run's configuration; of its text only the length counts, so it need not be named."""
    try:
        return parse_train_config(arguments, PROGRAM)
    except ConfigError as error:
        if not str(error).startswith("data.path: missing"):
            raise
    return parse_train_config([*arguments, "--data.path", "."], PROGRAM)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"json: cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
