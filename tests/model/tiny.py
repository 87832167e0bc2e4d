"""Tiny random models of every supported family, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar import QuietStarForCausalLM

VOCABULARY = 40

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WINDOW_THEN_FULL: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {**GROUPED, "model_type": "mistral", "sliding_window": None},
    "mistral_window": {**GROUPED, "model_type": "mistral", "sliding_window": 4},
    "llama": {**GROUPED, "model_type": "llama"},
    "qwen2": {**GROUPED, "model_type": "qwen2"},
    # the first layer sees everything, the second a window
    "qwen2_window": {
        **GROUPED,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {**GROUPED, "model_type": "qwen3", "head_dim": 8},
    "gemma": {**GROUPED, "model_type": "gemma", "head_dim": 8},
    "gpt_neox": {**SIZES, "model_type": "gpt_neox", "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "phi3": {**GROUPED, "model_type": "phi3"},
    "olmo2": {**GROUPED, "model_type": "olmo2"},
    "cohere": {**GROUPED, "model_type": "cohere", "logit_scale": 0.3},
    "granite": {
        **GROUPED,
        "model_type": "granite",
        "logits_scaling": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
    },
    # a cap that bends the scores of a tiny model, whose are small; the cap of the logits has tests of its own
    "gemma2": {
        **GROUPED,
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": None,
        **WINDOW_THEN_FULL,
    },
    # below: accepted by the probe and therefore tested, beyond the families that the documentation names
    "gemma3_text": {**GROUPED, "model_type": "gemma3_text", "head_dim": 8, **WINDOW_THEN_FULL},
    "olmo3": {**GROUPED, "model_type": "olmo3", **WINDOW_THEN_FULL},
    "cohere2": {**GROUPED, "model_type": "cohere2", "head_dim": 8, **WINDOW_THEN_FULL},
    "smollm3": {**GROUPED, "model_type": "smollm3"},
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": None,
    },
}

NORM_BEHIND = ("olmo2", "gemma2", "gemma3_text", "olmo3")
"""Families with a norm behind the last product of a layer, for which `replay="down"` is refused."""


def family_config(family: str, **changes: Any) -> PreTrainedConfig:
    fields = {**FAMILIES[family], **changes}
    config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return config


def make_base(family: str = "mistral", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A plain model whose weights are large enough for attention and every multiplier to matter."""
    torch.manual_seed(seed)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(family_config(family, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return base.eval()


def make_model(
    family: str = "mistral",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> QuietStarForCausalLM:
    """A thinking model whose START, END and mixing head are random, so that every gradient is there."""
    base = make_base(family, seed=seed, dtype=dtype, **(changes or {}))
    settings: dict[str, Any] = {"thought_length": 2, "lookahead": 3, "thoughts_per_position": 2, **options}
    model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6], **settings)
    randomize_thinking(model, seed)
    return model.eval()


def randomize_thinking(model: QuietStarForCausalLM, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (model.thought_embedding.weight, *model.mixing_head.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def make_ids(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every gradient, relative to the largest entry of its own tensor."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        error = float((actual[name] - wanted).abs().max())
        scale = float(wanted.abs().max())
        assert error <= tolerance * max(scale, 1e-3), f"{name}: {error:.2e} of {scale:.2e}"


def switch_checkpointing_on(base: Any, **options: Any) -> None:
    """By transformers' own method, which has another name since 5.24."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(options)
