"""How a model thinks: the options that a training run and a saved model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quietstar.config.options import Count, Finite, Positive, Temperature, check
from quietstar.errors import ConfigError
from quietstar_kernels.backends import Backend


@dataclass
class ThinkingOptions:
    """How a base model thinks before each token (Quiet-STaR, arXiv 2403.09629, sections 4.1-4.4).

    Args:
        thought_length: Number of sampled tokens in one thought, without START and END.
        lookahead: Number of true tokens after a thought that judge it (the paper's non-myopic loss, section 4.4).
        thoughts_per_position: Number of thoughts (K) sampled at each position in training; each one's baseline comes
            from the rewards of the others.
        interpolation: Predictions that the mixing weight w joins: `logits` (the released code: `softmax(w z_thought +
            (1-w) z_base)`) or `log_probs` (the paper's equation in section 4.3).
        mixing_activation: Function that turns the mixing head's output into w: `identity` leaves it unbounded as the
            released code does, `sigmoid` bounds it.
        initial_mixing_weight: Mixing weight of an untrained model. Null is the released code's head: no output bias and
            exactly 0 (0.5 with `sigmoid`). At 0 every reward and every gradient of START and END is exactly 0 too, so
            learning starts only after the mixing head alone has moved; a small positive weight avoids that.
        embedding_scale: Divisor of the stored START and END embeddings, which under AdamW multiplies their learning
            rate. The authors use 100; with 1 the trainer gives them a separate learning rate instead.
        thinking: Content of a thought: `sample`d tokens, or `pause`: copies of START, tokens without content, as a
            control.
        temperature: Sampling temperature of the thoughts.
        backend: Implementation of the kernels; `auto` picks the fastest one that the device supports.
    """

    thought_length: Count = 8
    lookahead: Count = 4
    thoughts_per_position: Count = 2
    interpolation: Literal["logits", "log_probs"] = "logits"
    mixing_activation: Literal["identity", "sigmoid"] = "identity"
    initial_mixing_weight: Finite | None = 0.1
    embedding_scale: Positive = 1.0
    thinking: Literal["sample", "pause"] = "sample"
    temperature: Temperature = 1.0
    backend: Backend = "auto"


def check_thinking(options: ThinkingOptions, prefix: str = "") -> None:
    """Refuses thinking options that no model can follow.

    Args:
        options: Thinking options, or an object with more fields, which are ignored.
        prefix: Text before the field names in messages, such as `model.`.

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
