"""Thought streams on an unmodified transformers backbone."""

from typing import TYPE_CHECKING

from quietstar.lazy_names import lazy_names

if TYPE_CHECKING:
    from quietstar.model.authors_checkpoint import load_authors_checkpoint
    from quietstar.model.configuration import QuietStarConfig
    from quietstar.model.modeling import QuietStarForCausalLM
    from quietstar.model.thoughts import Prediction, Thoughts

__all__ = ["Prediction", "QuietStarConfig", "QuietStarForCausalLM", "Thoughts", "load_authors_checkpoint"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "quietstar.model.authors_checkpoint": ("load_authors_checkpoint",),
        "quietstar.model.configuration": ("QuietStarConfig",),
        "quietstar.model.modeling": ("QuietStarForCausalLM",),
        "quietstar.model.thoughts": ("Prediction", "Thoughts"),
    },
)
