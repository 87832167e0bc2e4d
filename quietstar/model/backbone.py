"""What the engine needs of a base model: its output head, a supported family, and no dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from quietstar.errors import UnsupportedBackboneError
from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.logits import LogitOptions, operand_dtype, raw_logits

RANDOM_IN_TRAINING = ("dropout", "layerdrop", "jitter")
"""Parts of the names of module attributes that are rates of random changes in training."""


@dataclass(frozen=True)
class OutputHead:
    """The output head of a base model, which makes logits of final hidden states: `softcap(logit_scale * lm_head h)`.

    Args:
        weight: Matrix of the head, [V, E].
        softcap: Soft cap of the logits, softcap * tanh(logits / softcap); None for no cap.
        logit_scale: Factor of the product with the matrix.
    """

    weight: Tensor
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., E], computed as the losses compute them.

        They are float32, or float64 for float64 states.
        """
        return self._logits(hidden, operand_dtype(self.weight, compute_dtype(hidden, self.weight), hidden))

    def mixed_logits(self, hidden_base: Tensor, hidden_thought: Tensor, weight: Tensor, interpolation: str) -> Tensor:
        """Return the mixed prediction whose loss `mixed_cross_entropy` gives, [..., V].

        Args:
            hidden_base: Hidden states without thought, [..., E].
            hidden_thought: Hidden states after the thought, [..., E].
            weight: Mixing weight of the thought, [...].
            interpolation: Quantity that the weight mixes: "logits" or "log_probs".
        """
        share = weight[..., None]
        if interpolation == "log_probs":
            base, thought = (self.logits(hidden).log_softmax(-1) for hidden in (hidden_base, hidden_thought))
            return torch.lerp(base, thought, share)
        dtype = compute_dtype(hidden_base, hidden_thought, share, self.weight)
        mixed = torch.lerp(hidden_base.to(dtype), hidden_thought.to(dtype), share.to(dtype))
        return self._logits(mixed, operand_dtype(self.weight, dtype, hidden_base, hidden_thought))

    def _logits(self, hidden: Tensor, operand: torch.dtype) -> Tensor:
        """Return logits whose product with the head has operands of dtype `operand`; see `raw_logits`."""
        raw = raw_logits(hidden.flatten(0, -2), self.weight.to(operand), compute_dtype(hidden, self.weight))
        options = LogitOptions(softcap=self.softcap, logit_scale=self.logit_scale)
        if raw.requires_grad:
            raw = options.transform(raw)
        else:
            options.transform_(raw)
        return raw.view(*hidden.shape[:-1], -1)


def check_configuration(config: PreTrainedConfig) -> None:
    """Refuse families that are known to be unsupported, before any weight is loaded.

    Raises:
        UnsupportedBackboneError: The family is unsupported; the message names it and the reason.
    """
    family = config.model_type
    if family == "quietstar":
        raise UnsupportedBackboneError(f"{family}: a thinking model already; load it with from_pretrained")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {value.get("rope_type") for value in rope.values() if isinstance(value, dict)} | {rope.get("rope_type")}
    changing = [kind for kind in ("dynamic", "longrope") if kind in kinds]
    if changing:
        raise UnsupportedBackboneError(
            f"{family}: its rotary frequencies depend on the longest position in a batch "
            f"({', '.join(changing)}), so a thought's keys would differ from pass to pass"
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedBackboneError(f"{family}: chunked attention is not supported by thought attention")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedBackboneError(f"{family}: an encoder-decoder model; Quiet-STaR needs a decoder-only causal LM")


def output_head(base: PreTrainedModel) -> OutputHead:
    """Return the output head of a base model.

    Raises:
        UnsupportedBackboneError: The head has a bias, or is not one matrix (quantised, or with an adapter).
    """
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise UnsupportedBackboneError(
            f"{base.config.model_type}: its lm_head is a {kind}, the fused loss needs a plain one (torch.nn.Linear)"
        )
    if head.bias is not None:
        raise UnsupportedBackboneError(
            f"{base.config.model_type}: its lm_head has a bias, which the fused loss does not support"
        )
    config: Any = base.config
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(head.weight, getattr(config, "final_logit_softcapping", None), scale)


def disable_dropout(base: nn.Module) -> None:
    """Set every dropout and router jitter to 0: the states that sample a thought must be those that are trained."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in RANDOM_IN_TRAINING):
                vars(module)[name] = 0.0
