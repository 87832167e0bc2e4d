"""Batched sampling of completions, through transformers or vLLM."""

from typing import TYPE_CHECKING

from quietstar.lazy_names import lazy_names

if TYPE_CHECKING:
    from quietstar.outer_loop.sampling.choice import make_sampler
    from quietstar.outer_loop.sampling.requests import Generation, Request, Sampler, sample_seed

__all__ = ["Generation", "Request", "Sampler", "make_sampler", "sample_seed"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "quietstar.outer_loop.sampling.choice": ("make_sampler",),
        "quietstar.outer_loop.sampling.requests": ("Generation", "Request", "Sampler", "sample_seed"),
    },
)
