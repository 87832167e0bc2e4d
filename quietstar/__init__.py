"""Quiet-STaR on any Hugging Face causal language model: models that think before they speak.

Importing this package registers the model with transformers' Auto classes. It imports neither torch nor transformers
until a name of it is used.
"""

from typing import TYPE_CHECKING

from quietstar.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    QuietStarError,
    UnsupportedBackboneError,
)
from quietstar.lazy_names import lazy_names
from quietstar.registration import register

if TYPE_CHECKING:
    from quietstar.inference.gate import fit_gate
    from quietstar.inference.loading import load_thinking
    from quietstar.model import (
        Prediction,
        QuietStarConfig,
        QuietStarForCausalLM,
        Thoughts,
        load_authors_checkpoint,
    )
    from quietstar.model.adapter_files import load_finetuned
    from quietstar.objective import PRESETS, LearnOutput, Objective, learn
    from quietstar.outer_loop.verifiers.verifier import Verifier

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LearnOutput",
    "NonFiniteError",
    "Objective",
    "Prediction",
    "QuietStarConfig",
    "QuietStarError",
    "QuietStarForCausalLM",
    "Thoughts",
    "UnsupportedBackboneError",
    "Verifier",
    "fit_gate",
    "learn",
    "load_authors_checkpoint",
    "load_finetuned",
    "load_thinking",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "quietstar.inference.gate": ("fit_gate",),
        "quietstar.inference.loading": ("load_thinking",),
        "quietstar.model": (
            "Prediction",
            "QuietStarConfig",
            "QuietStarForCausalLM",
            "Thoughts",
            "load_authors_checkpoint",
        ),
        "quietstar.model.adapter_files": ("load_finetuned",),
        "quietstar.objective": ("PRESETS", "LearnOutput", "Objective", "learn"),
        "quietstar.outer_loop.verifiers.verifier": ("Verifier",),
    },
)
register()
