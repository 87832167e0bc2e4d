"""Whether a model takes as many steps as a human who solved the same problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quietstar.evaluation.arguments import Array, numbers, same_length
from quietstar.evaluation.verifier_quality import average_ranks


@dataclass(frozen=True)
class StepCounts:
    """Steps of the model's rationales against the human-written ones.

    Args:
        problems: How many have both.
        model: Mean steps of the model.
        human: Mean steps of the human.
        equal: Share of problems with as many steps in both.
        fewer: Share where the model takes fewer.
        pearson: Correlation, or None where one of the two always takes as many steps.
        spearman: Correlation of the ranks, equal ones sharing their mean, or None.
    """

    problems: int
    model: float
    human: float
    equal: float
    fewer: float
    pearson: float | None
    spearman: float | None


def compare_step_counts(model: ArrayLike, human: ArrayLike) -> StepCounts:
    """The comparison that STaR (2203.14465, section 4) makes for GSM8K's calculation steps.

    Args:
        model: [problems], steps of the model's rationale.
        human: [problems], of the human-written one.

    Raises:
        DataError: The lengths differ, or a count is NaN.
    """
    model, human = numbers("model", model), numbers("human", human)
    same_length(model=model, human=human)
    return StepCounts(
        problems=len(model),
        model=float(model.mean()),
        human=float(human.mean()),
        equal=float((model == human).mean()),
        fewer=float((model < human).mean()),
        pearson=_correlation(model, human),
        spearman=_correlation(average_ranks(model), average_ranks(human)),
    )


def _correlation(first: Array, second: Array) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])
