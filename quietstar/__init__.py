"""Quiet-STaR on any Hugging Face causal language model: models that think before they speak.

Importing this package registers the model with transformers' Auto classes. It imports neither torch nor transformers
until a name of it is used.
"""

import signal
import sys
from typing import TYPE_CHECKING

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # this is `python -m quietstar...`: until `run_command` answers it, Ctrl-C ends the process, and no traceback comes
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from quietstar.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    QuietStarError,
    UnsupportedBackboneError,
)
from quietstar.imports import lazy_names, register

if TYPE_CHECKING:
    from quietstar.config.objective import PRESETS, Objective
    from quietstar.inference.gate import fit_gate
    from quietstar.inference.loading import load_finetuned, load_thinking
    from quietstar.model.authors_checkpoint import load_authors_checkpoint
    from quietstar.model.configuration import QuietStarConfig
    from quietstar.model.modeling import QuietStarForCausalLM
    from quietstar.model.thoughts import Prediction, Thoughts
    from quietstar.objective.learning import LearnOutput, learn
    from quietstar.verifiers.verifier import Verifier

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
        "quietstar.inference.loading": ("load_finetuned", "load_thinking"),
        "quietstar.model.authors_checkpoint": ("load_authors_checkpoint",),
        "quietstar.model.configuration": ("QuietStarConfig",),
        "quietstar.model.modeling": ("QuietStarForCausalLM",),
        "quietstar.model.thoughts": ("Prediction", "Thoughts"),
        "quietstar.objective.learning": ("LearnOutput", "learn"),
        "quietstar.config.objective": ("PRESETS", "Objective"),
        "quietstar.verifiers.verifier": ("Verifier",),
    },
)
register()
