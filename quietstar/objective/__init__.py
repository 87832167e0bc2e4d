"""The non-myopic loss and REINFORCE (Quiet-STaR, sections 4.4.1 and 4.4.2)."""

from typing import TYPE_CHECKING

from quietstar.lazy_names import lazy_names

if TYPE_CHECKING:
    from quietstar.objective.counts import Counts
    from quietstar.objective.learning import LearnOutput, learn
    from quietstar.objective.options import PRESETS, Objective, resolve_objective

__all__ = ["PRESETS", "Counts", "LearnOutput", "Objective", "learn", "resolve_objective"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "quietstar.objective.counts": ("Counts",),
        "quietstar.objective.learning": ("LearnOutput", "learn"),
        "quietstar.objective.options": ("PRESETS", "Objective", "resolve_objective"),
    },
)
