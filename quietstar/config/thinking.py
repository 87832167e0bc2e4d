"""How a base model thinks: the options that a run and a saved model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quietstar.config.options import Count, Finite, Positive, check
from quietstar.errors import ConfigError
from quietstar_kernels.backends import Backend


@dataclass
class ThinkingOptions:
    """How a base model thinks before each token (Quiet-STaR, arXiv 2403.09629, sections 4.1-4.4).

    Args:
        thought_length: Sampled tokens in one thought, START and END not counted.
        lookahead: True tokens after a thought that it is judged by (the paper's non-myopic loss, section 4.4).
        thoughts_per_position: Thoughts sampled at each position in training (K); their rewards are each other's
            baseline.
        interpolation: What the mixing weight w joins: `logits` (the released code: `softmax(w z_thought + (1-w)
            z_base)`) or `log_probs` (the paper's equation in section 4.3).
        mixing_activation: What turns the mixing head's output into w: `identity` leaves it unbounded as the released
            code does, `sigmoid` bounds it.
        initial_mixing_weight: Mixing weight of an untrained model. Null is the released code's head: no output bias and
            exactly 0 (a half with `sigmoid`). At 0 every reward and every gradient of START and END is exactly 0 too,
            so that learning starts only after the mixing head alone has moved; a small positive weight avoids that.
        embedding_scale: START and END are stored divided by this, which under AdamW multiplies their learning rate. The
            authors use 100; with 1 the trainer gives them a learning rate of their own instead.
        thinking: `sample` tokens for each thought, or `pause`: START in their place, tokens without content, as a
            control.
        temperature: Sampling temperature of the thoughts.
        backend: Which kernels to use; `auto` picks the fastest that the device has.
    """

    thought_length: Count = 8
    lookahead: Count = 4
    thoughts_per_position: Count = 2
    interpolation: Literal["logits", "log_probs"] = "logits"
    mixing_activation: Literal["identity", "sigmoid"] = "identity"
    initial_mixing_weight: Finite | None = 0.1
    embedding_scale: Positive = 1.0
    thinking: Literal["sample", "pause"] = "sample"
    temperature: Positive = 1.0
    backend: Backend = "auto"


def check_thinking(options: ThinkingOptions, prefix: str = "") -> None:
    """Refuses what no model can do.

    Args:
        options: Or an object with more fields, whose others are not looked at.
        prefix: What stands before a field's name in messages.

    Raises:
        ConfigError: naming the option, the value, and what is needed.
    """
    check(options, prefix, ThinkingOptions)
    weight = options.initial_mixing_weight
    if weight is not None and options.mixing_activation == "sigmoid" and not 0 < weight < 1:
        raise ConfigError(
            f"{prefix}initial_mixing_weight: got {weight}, but with {prefix}mixing_activation sigmoid it lies strictly "
            "between 0 and 1"
        )
