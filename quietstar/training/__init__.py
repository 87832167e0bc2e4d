"""One trainer for every method: loop, optimizer, checkpoints, metrics."""

from typing import TYPE_CHECKING

from quietstar.lazy_names import lazy_names

if TYPE_CHECKING:
    from quietstar.training.checkpoint import (
        load_weights,
        save_checkpoint,
        take_snapshot,
    )
    from quietstar.training.metrics import MetricsWriter, read_metrics
    from quietstar.training.optimizer import MasterAdamW, ParameterGroup, build_optimizer, build_parameter_groups
    from quietstar.training.schedule import learning_rate
    from quietstar.training.seeds import thought_seed
    from quietstar.training.step import StepResult
    from quietstar.training.trainer import Trainer, TrainingResult
    from quietstar.training.whole_checkpoints import latest_checkpoint, verify_checkpoint

__all__ = [
    "MasterAdamW",
    "MetricsWriter",
    "ParameterGroup",
    "StepResult",
    "Trainer",
    "TrainingResult",
    "build_optimizer",
    "build_parameter_groups",
    "latest_checkpoint",
    "learning_rate",
    "load_weights",
    "read_metrics",
    "save_checkpoint",
    "take_snapshot",
    "thought_seed",
    "verify_checkpoint",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "quietstar.training.checkpoint": ("load_weights", "save_checkpoint", "take_snapshot"),
        "quietstar.training.metrics": ("MetricsWriter", "read_metrics"),
        "quietstar.training.optimizer": ("MasterAdamW", "ParameterGroup", "build_optimizer", "build_parameter_groups"),
        "quietstar.training.schedule": ("learning_rate",),
        "quietstar.training.seeds": ("thought_seed",),
        "quietstar.training.step": ("StepResult",),
        "quietstar.training.trainer": ("Trainer", "TrainingResult"),
        "quietstar.training.whole_checkpoints": ("latest_checkpoint", "verify_checkpoint"),
    },
)
