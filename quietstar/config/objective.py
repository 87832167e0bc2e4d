"""The options of the training objective and its presets; each difference from the authors' code is an option."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from typing import Any, Literal

from quietstar.config.options import NonNegative, Temperature, check, type_hints
from quietstar.errors import ConfigError


@dataclass(frozen=True)
class Objective:
    """The loss `base_weight * NLL_base + talk_weight * mean_j NLL_talk_j + policy_weight * REINFORCE`.

    Args:
        base_weight: Weight of the NLL of the prediction without thought; it keeps the base model able to predict alone.
        talk_weight: Weight of the NLL of the mixed prediction, averaged over the lookahead tokens j.
        policy_weight: Weight of the REINFORCE term; 0 turns it off. The authors' 1e6 makes its gradient 1e3 to 1e4
            times that of the language-modelling loss, and clipping both to one common norm then wipes that loss out; 1
            is the scale of that loss.
        baseline: Value subtracted from a thought's reward. `leave_one_out`, the mean reward of the position's other
            thoughts, is unbiased and keeps the scale; `mean` (the authors') includes the thought itself and so shrinks
            the advantage by (K-1)/K, and subtracts nothing at K = 1; `none` leaves only the comparison with the
            prediction without thought.
        clamp_negative_advantage: Whether only thoughts that helped are learned from (the authors' choice). It discards
            half of the signal; its advantages all have one sign and push the entropy of thoughts down whatever they are
            worth.
        policy_temperature: Temperature of the log-probabilities in REINFORCE. Null: the temperature at which thoughts
            were sampled, the only one for which the gradient is that of the expected reward; the authors sample at 1
            and use 3, without an importance weight.
        token_reduction: Reduction of the log-probabilities of a thought's tokens: their `sum` is the log-probability of
            the thought; their `mean`, the authors' choice, divides the policy gradient by the thought's length.
        reward_precision: Precision of the NLLs that rewards are differences of: `float32` is exact; `model` rounds them
            to the model's dtype first (the authors'): in bfloat16 an NLL of 8 to 16 is a multiple of 1/16.
        policy_positions: Positions that REINFORCE averages over: `valid`, thoughts that have a target; `authors`, all
            positions that have a whole lookahead and one more token after it, padding included.
        loss_mean: Divisor of the mean NLL: `valid`, the number of targets; `nonzero`, the number of losses that are not
            exactly 0 (the authors', who mark padding that way).

    Raises:
        ConfigError: A value is out of range.
    """

    base_weight: NonNegative = 0.5
    talk_weight: NonNegative = 0.5
    policy_weight: NonNegative = 1.0
    baseline: Literal["leave_one_out", "mean", "none"] = "leave_one_out"
    clamp_negative_advantage: bool = False
    policy_temperature: Temperature | None = None
    token_reduction: Literal["sum", "mean"] = "sum"
    reward_precision: Literal["float32", "model"] = "float32"
    policy_positions: Literal["valid", "authors"] = "valid"
    loss_mean: Literal["valid", "nonzero"] = "valid"

    def __post_init__(self) -> None:
        check(self, "objective.")


OBJECTIVE_PRESETS: dict[str, Objective] = {
    "default": Objective(),
    # Section 4.4 and its appendix: the mixed prediction and REINFORCE alone.
    "paper": Objective(
        base_weight=0.0,
        talk_weight=1.0,
        policy_weight=1e6,
        baseline="mean",
        clamp_negative_advantage=True,
        policy_temperature=3.0,
    ),
    # The released code, formula by formula.
    "authors": Objective(
        policy_weight=1e6,
        baseline="mean",
        clamp_negative_advantage=True,
        policy_temperature=3.0,
        token_reduction="mean",
        reward_precision="model",
        policy_positions="authors",
        loss_mean="nonzero",
    ),
}
PRESETS = OBJECTIVE_PRESETS  # their public name is `quietstar.PRESETS`


_Overrides: Any = make_dataclass(
    "_Overrides",
    [
        ("preset", Literal["default", "paper", "authors"], "default"),
        *((name, hint | None, None) for name, hint in type_hints(Objective, True).items()),
    ],
    namespace={"__doc__": Objective.__doc__},
)


class ObjectiveOptions(_Overrides):  # type: ignore[misc]  # its fields are those of Objective, made above
    """The training objective: a preset, and overrides of single options (null keeps the preset's value).

    Args:
        preset: Name of the preset: `default`, `paper` (the paper's equations) or `authors` (the released code, number
            for number).
    """


def resolve_objective(objective: str | Objective, **overrides: Any) -> Objective:
    """Returns a preset by name, or the given objective, with single options replaced.

    Raises:
        ConfigError: An unknown preset or option, or a value out of range.
    """
    if isinstance(objective, str):
        if objective not in OBJECTIVE_PRESETS:
            names = ", ".join(OBJECTIVE_PRESETS)
            raise ConfigError(f"objective: got {objective!r}, needs one of {names} or an Objective")
        objective = OBJECTIVE_PRESETS[objective]
    known = [entry.name for entry in fields(Objective)]
    for name in overrides:
        if name not in known:
            raise ConfigError(f"objective.{name}: unknown, the options are {', '.join(known)}")
    return replace(objective, **overrides)


def objective_of(options: ObjectiveOptions) -> Objective:
    """Returns the preset with those overrides that are not None."""
    overrides = {name: value for name, value in asdict(options).items() if value is not None}
    return resolve_objective(overrides.pop("preset"), **overrides)
