"""Measures of samples, votes and verifiers, exact where they can be."""

from quietstar.evaluation.bootstrap import Interval, bootstrap_interval, paired_difference
from quietstar.evaluation.candidate_table import CandidateTable, Difference, Row, measure_candidates
from quietstar.evaluation.candidates import Candidates
from quietstar.evaluation.counting import pass_at_k
from quietstar.evaluation.progress import (
    Distinct,
    GroupMeasures,
    Growth,
    answer_entropy,
    by_group,
    distinct_solutions,
    growth,
    hinted_share,
    truncation_rate,
)
from quietstar.evaluation.ranking import best_of_k
from quietstar.evaluation.regressions import Regression, coverage_falls, held_out_falls
from quietstar.evaluation.step_counts import StepCounts, compare_step_counts
from quietstar.evaluation.verifier_quality import Calibration, Discrimination, auroc, calibration, discrimination
from quietstar.evaluation.voting import maj_at_k, majority_votes, weighted_vote_at_k

__all__ = [
    "Calibration",
    "CandidateTable",
    "Candidates",
    "Difference",
    "Discrimination",
    "Distinct",
    "GroupMeasures",
    "Growth",
    "Interval",
    "Regression",
    "Row",
    "StepCounts",
    "answer_entropy",
    "auroc",
    "best_of_k",
    "bootstrap_interval",
    "by_group",
    "calibration",
    "compare_step_counts",
    "coverage_falls",
    "discrimination",
    "distinct_solutions",
    "growth",
    "held_out_falls",
    "hinted_share",
    "maj_at_k",
    "majority_votes",
    "measure_candidates",
    "paired_difference",
    "pass_at_k",
    "truncation_rate",
    "weighted_vote_at_k",
]
