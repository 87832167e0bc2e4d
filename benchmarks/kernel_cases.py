"""A representative call of every kernel, by the names of the pinned table: what is compiled, and what the tuner times.

The sizes are Mistral-7B's with 8 texts of 256 tokens and streams of 16. Sizes are no part of a case, so that a kernel
compiled for these is the one that runs for others; what makes another kernel of it is a *variant*: a window, a soft
cap, a start of each text (padding) or of each stream, a head size that is no power of two, the other 16-bit type.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quietstar_kernels.configurations import Configuration
from quietstar_kernels.launch import Launch
from quietstar_kernels.logits import LogitOptions, empty_logits
from quietstar_kernels.mixed_cross_entropy import launches as mixed_cross_entropy
from quietstar_kernels.thought_attention import op as thought_attention
from quietstar_kernels.token_sampling import op as token_sampling

B, L, P, S, H, HKV = 8, 256, 256, 16, 32, 8
STEP_KEYS = 9
"""Own keys of a stream in the sampling step: the mean over a stream of 16."""
N, V, E = 2048, 32002, 4096
IGNORE_INDEX = -100

DTYPES = {"16-bit": torch.bfloat16, "32-bit": torch.float32, "64-bit": torch.float64}


class Case:
    """Tensors for one case and variant.

    Args:
        case: as in the pinned table, such as "16-bit D128".
        variant: "plain", or what is not, as in "window + softcap".
        device: where the tensors are; on the meta device they take no memory.
    """

    def __init__(self, case: str, variant: str, device: torch.device) -> None:
        self.case = case
        self.options = set(variant.split(" + "))
        self.device = device
        self.dtype = torch.float16 if "fp16" in self.options else DTYPES[case.split()[0]]
        self.result_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

    def size(self, letter: str, usual: int = 0) -> int:
        """The size that the variant or else the case gives, as in "D128"."""
        found = [part for part in (*self.options, *self.case.split()) if re.fullmatch(rf"{letter}\d+", part)]
        return int(found[0].removeprefix(letter)) if found else usual

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


# --------------------------------------------------------------------------------------------------- thought attention


def _attention_variants(case: str) -> tuple[str, ...]:
    everything = "window + softcap + stream starts"
    if case == "16-bit D128":
        return "plain", "fp16", "D80", "window + padding", "softcap", "stream starts", everything
    return ("plain", everything) if case.startswith("16-bit") else (everything,)


def _attention(case: Case, tokens: int, keys: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the options that the kernels share."""
    D = case.size("D")
    text_start = None
    if "padding" in case.options or "stream starts" in case.options:
        shape = (B, P) if "stream starts" in case.options else (B,)
        text_start = torch.zeros(shape, dtype=torch.int32, device=case.device)
    tensors = {
        "q": case.random(B, P, tokens, H, D),
        "k_text": case.random(B, L, HKV, D),
        "v_text": case.random(B, L, HKV, D),
        "k_thought": case.random(B, P, keys, HKV, D),
        "v_thought": case.random(B, P, keys, HKV, D),
        "anchor": torch.arange(P, dtype=torch.int32, device=case.device),
        "text_start": text_start,
    }
    options = {
        "window": L if "window" in case.options else None,
        "scale": D**-0.5,
        "softcap": 30.0 if "softcap" in case.options else None,
    }
    return tensors, options


def _attention_forward(case: Case, configuration: Configuration, tokens: int = S, keys: int = S) -> Launch:
    tensors, options = _attention(case, tokens, keys)
    out, lse = case.empty(*tensors["q"].shape), case.empty(B, P, tokens, H, dtype=case.result_dtype)
    return thought_attention.forward_launch(**tensors, out=out, lse=lse, **options, configuration=configuration)


def _attention_step(case: Case, configuration: Configuration) -> Launch:
    return _attention_forward(case, configuration, tokens=1, keys=STEP_KEYS)


def _attention_saved(case: Case) -> dict[str, Tensor]:
    """What the backward kernels have besides the inputs: lse is about that of random keys."""
    return {
        "lse": torch.full((B, P, S, H), 5.0, dtype=case.result_dtype, device=case.device),
        "delta": case.random(B, P, S, H, dtype=case.result_dtype),
        "grad_out": case.random(B, P, S, H, case.size("D")),
    }


def _attention_backward_streams(case: Case, configuration: Configuration) -> Launch:
    tensors, options = _attention(case, S, S)
    tensors |= _attention_saved(case)
    for name in ("q", "k_thought", "v_thought"):
        tensors[f"grad_{name}"] = torch.empty_like(tensors[name])
    tensors |= {"out": case.random(*tensors["q"].shape), "grad_lse": torch.zeros_like(tensors["lse"])}
    return thought_attention.backward_streams_launch(**tensors, **options, configuration=configuration)


def _attention_backward_text(case: Case, configuration: Configuration) -> Launch:
    tensors, options = _attention(case, S, S)
    del tensors["k_thought"], tensors["v_thought"]
    tensors |= _attention_saved(case)
    parts = thought_attention.grad_text_parts(tensors["q"], tensors["k_text"], configuration)
    for name in ("k", "v"):
        tensors[f"grad_{name}_parts"] = case.empty(parts, B, HKV, L, case.size("D"), dtype=case.result_dtype)
    return thought_attention.backward_text_launch(**tensors, **options, configuration=configuration)


# ---------------------------------------------------------------------------------------------------------------- head


def _head_variants(*more: str) -> Callable[[str], tuple[str, ...]]:
    return lambda case: ("plain", *(() if case.startswith("64-bit") else more))


def _targets(case: Case) -> Tensor:
    return torch.zeros(N, dtype=torch.int64, device=case.device)


def _states(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states in the model's dtype and what they are mixed with."""
    return {
        "base": case.random(N, E, dtype=dtype),
        "thought": case.random(N, E, dtype=dtype),
        "weight": torch.full((N,), 0.1, dtype=dtype, device=case.device),
    }


def _mix(case: Case, configuration: Configuration) -> Launch:
    """A training step's mixture."""
    return mixed_cross_entropy.mix_launch(
        **_states(case, case.dtype),
        target=_targets(case),
        row_scale=case.random(N, dtype=case.result_dtype),
        states=case.empty(N, E),
        scaled=case.empty(N, E),
        ignore_index=IGNORE_INDEX,
        residual=None,
        configuration=configuration,
    )


def _raw_logits(case: Case) -> Tensor:
    raw = empty_logits(N, case.size("V", V), case.dtype, case.device)
    return raw.normal_()


def _logit_options(case: Case) -> LogitOptions:
    return LogitOptions(softcap=30.0 if "softcap" in case.options else None)


def _loss(case: Case, configuration: Configuration, gradient: Tensor | None = None) -> Launch:
    return mixed_cross_entropy.loss_launch(
        raw=_raw_logits(case),
        target=_targets(case),
        lse=case.random(N),
        nll=None if "known lse" in case.options else case.empty(N),
        gradient=gradient,
        options=_logit_options(case),
        ignore_index=IGNORE_INDEX,
        configuration=configuration,
    )


def _loss_gradient(case: Case, configuration: Configuration) -> Launch:
    """The gradient in the product's dtype, beside the logits."""
    dtype = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    return _loss(case, configuration, empty_logits(N, case.size("V", V), dtype, case.device))


def _hidden_gradient(case: Case, configuration: Configuration) -> Launch:
    """From the gradient of the mixed state in the sums' dtype; the model's is a 16-bit one unless they are float64."""
    low = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    return mixed_cross_entropy.hidden_gradient_launch(
        gradient=case.random(N, E),
        **_states(case, low),
        states=case.random(N, E, dtype=low),
        target=_targets(case),
        stored=case.empty(N, E, dtype=low),
        nll=None if low == case.dtype else case.random(N),
        to_weight=case.empty(N),
        ignore_index=IGNORE_INDEX,
        configuration=configuration,
    )


def _sample(case: Case, configuration: Configuration) -> Launch:
    return token_sampling.sample_launch(
        raw=_raw_logits(case),
        uniform=None if "greedy" in case.options else torch.rand(N, dtype=torch.float64, device=case.device),
        token=torch.empty(N, dtype=torch.int64, device=case.device),
        logprob=case.empty(N),
        lse=case.empty(N),
        options=_logit_options(case),
        configuration=configuration,
    )


# ------------------------------------------------------------------------------------------------------------ registry

KERNELS: dict[str, tuple[Callable[[str], tuple[str, ...]], Callable[[Case, Configuration], Launch]]] = {
    "thought_attention.forward": (_attention_variants, _attention_forward),
    "thought_attention.step": (_attention_variants, _attention_step),
    "thought_attention.backward_streams": (_attention_variants, _attention_backward_streams),
    "thought_attention.backward_text": (_attention_variants, _attention_backward_text),
    "mixed_cross_entropy.mix": (_head_variants(), _mix),
    "mixed_cross_entropy.loss": (_head_variants("softcap"), _loss),
    "mixed_cross_entropy.loss_gradient": (_head_variants("known lse", "softcap"), _loss_gradient),
    "mixed_cross_entropy.hidden_gradient": (_head_variants(), _hidden_gradient),
    "token_sampling.sample": (_head_variants("greedy", "softcap", "V151936"), _sample),
}
"""Kernel -> the variants of a case, and the call."""


def variants(kernel: str, case: str) -> tuple[str, ...]:
    """The variants in which a case is compiled, the one with the most code last; "plain" exists for every case."""
    return KERNELS[kernel][0](case)


def launch(kernel: str, case: str, variant: str, configuration: Configuration, device: torch.device) -> Launch:
    """A representative call, not yet run.

    Args:
        kernel: as in the pinned table.
        case: as in the pinned table.
        variant: "plain", or one of `variants(kernel, case)`.
        configuration: block sizes, warps and stages.
        device: "meta" to compile, "cuda" to run.
    """
    return KERNELS[kernel][1](Case(case, variant, device), configuration)
