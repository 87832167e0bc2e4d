"""The kernels of Quiet-STaR (arXiv 2403.09629): torch and Triton only, they know nothing of models.

`thought_attention` is the diagonal attention of parallel thoughts, `mixed_cross_entropy` the loss after the mixing
head, `linear_cross_entropy` the same loss of one hidden state, `sample_tokens` draws tokens from hidden states.
Every function takes `backend=`: "reference" is the readable specification, whole mask and whole logits; "torch" is
structured PyTorch, which holds neither; "triton" kernels for GPUs. "auto" is "triton" for CUDA tensors of 16 or 32 bits
and "torch" for others, or what the environment variable `QUIETSTAR_BACKEND` says.

The functions are imported when they are used (PEP 562): the names of the backends need no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quietstar_kernels.mixed_cross_entropy import linear_cross_entropy, mixed_cross_entropy
    from quietstar_kernels.thought_attention import thought_attention
    from quietstar_kernels.token_sampling import sample_tokens

__all__ = ["linear_cross_entropy", "mixed_cross_entropy", "sample_tokens", "thought_attention"]

_HOMES = {
    "linear_cross_entropy": "mixed_cross_entropy",
    "mixed_cross_entropy": "mixed_cross_entropy",
    "sample_tokens": "token_sampling",
    "thought_attention": "thought_attention",
}


class _Operations(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # importing thought_attention or mixed_cross_entropy binds its name here, which its function has as well
        is_package = isinstance(value, ModuleType) and name in __all__
        super().__setattr__(name, getattr(value, name) if is_package else value)

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        setattr(self, name, value)  # found without this method from now on
        return value

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Operations
