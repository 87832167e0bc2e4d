"""Sampling tokens from hidden states against sampling them from logits: time, throughput, memory, and the targets.

    python benchmarks/token_sampling.py

One draw per row, with the token's log-probability, which REINFORCE and the thoughts' log want. Sides:

* `triton`, `torch`, `reference`: the backends of `quietstar_kernels.sample_tokens`.
* `multinomial`: logits in the model's dtype, float32 softmax, `torch.multinomial`.
* `gumbel`: float32 logits plus Gumbel noise, the largest wins.
* `exponential`: the probability over an exponential number, the largest wins: the same draw with less arithmetic.

Useful work is 2 N V E operations. Before it is timed, a side's log-probabilities are compared with those of the
reference in float32 at its tokens, and the tokens that it draws from one repeated row are compared with that row's
distribution (chi-square). `greedy` takes the most probable token.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from torch import Tensor

from benchmarks.bars import bar
from benchmarks.gpu_timing import (
    LARGEST_ERROR,
    KernelBenchmark,
    Measurement,
    Session,
    Target,
    dtype_name,
    milliseconds,
    relative_error,
)
from benchmarks.mixed_cross_entropy import HEAD_STD, MODELS
from quietstar_kernels import sample_tokens

WORK = ("sample", "greedy")
OURS = ("triton", "torch")
FREQUENT = 15  # tokens with a bin of their own; all others share one
LARGEST_DEVIATION = 5.0  # standard deviations of the chi-square statistic's cube root: one draw in ten million


@dataclasses.dataclass(frozen=True)
class Shape:
    """N rows."""

    model: str
    rows: int
    vocabulary: int
    hidden: int

    @property
    def point(self) -> dict[str, Any]:
        return {"model": self.model, "N": self.rows}

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.vocabulary * self.hidden

    def least_bytes(self, size: int) -> int:
        return (self.rows + self.vocabulary) * self.hidden * size + 12 * self.rows


class Problem:
    """Hidden states [N, E] and a head [V, E] whose distributions have a few frequent tokens."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        N, V, E = shape.rows, shape.vocabulary, shape.hidden
        self.lm_head = (HEAD_STD * torch.randn(V, E, device=device)).to(dtype)
        frequent = torch.randint(V, (N, 4), device=device)
        toward = 8.0 / (E * HEAD_STD**2) * self.lm_head[frequent].float().sum(1)
        self.hidden = (toward + torch.randn(N, E, device=device)).to(dtype)

    def log_probs(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.lm_head.float().T).log_softmax(-1)


Draw = Callable[[Tensor, Tensor, bool, int], tuple[Tensor, Tensor]]
"""hidden, lm_head, greedy, seed -> token [N], log-probability [N]."""


def kernel(hidden: Tensor, head: Tensor, greedy: bool, seed: int, backend: str) -> tuple[Tensor, Tensor]:
    return sample_tokens(hidden, head, seed=seed, greedy=greedy, backend=backend)


def from_logits(
    hidden: Tensor, head: Tensor, greedy: bool, seed: int, choose: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`seed` is left to torch's generator, which the process seeds once."""
    log_probs = (hidden @ head.T).float().log_softmax(-1)
    token = log_probs.argmax(-1, keepdim=True) if greedy else choose(log_probs)
    return token.squeeze(-1), log_probs.gather(-1, token).squeeze(-1)


def multinomial(log_probs: Tensor) -> Tensor:
    return torch.multinomial(log_probs.exp(), 1)


def gumbel(log_probs: Tensor) -> Tensor:
    noise = torch.empty_like(log_probs).exponential_().log_().neg_()
    return noise.add_(log_probs).argmax(-1, keepdim=True)


def exponential(log_probs: Tensor) -> Tensor:
    return (log_probs.exp() / torch.empty_like(log_probs).exponential_()).argmax(-1, keepdim=True)


SIDES: dict[str, Draw] = {
    "triton": partial(kernel, backend="triton"),
    "torch": partial(kernel, backend="torch"),
    "reference": partial(kernel, backend="reference"),
    "multinomial": partial(from_logits, choose=multinomial),
    "gumbel": partial(from_logits, choose=gumbel),
    "exponential": partial(from_logits, choose=exponential),
}
SAME_GREEDY = ("gumbel", "exponential")


def deviation(tokens: Tensor, log_probs: Tensor) -> float:
    """How far tokens [N] are from having been drawn from log_probs [V], in standard deviations.

    Pearson's statistic over the most probable tokens and a bin for the rest, its cube root made a standard normal
    variable (Wilson and Hilferty).
    """
    probability, index = log_probs.exp().double().topk(min(FREQUENT, log_probs.shape[0] - 1))
    kept = probability * tokens.shape[0] >= 5  # bins that expect fewer draws are no chi-square
    probability, index = probability[kept], index[kept]
    if not len(index):
        return 0.0
    counts = (tokens[:, None] == index).sum(0).double()
    observed = torch.cat([counts, tokens.shape[0] - counts.sum(0, keepdim=True)])
    wanted = torch.cat([probability, 1 - probability.sum(0, keepdim=True)]) * tokens.shape[0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def measure_shape(session: Session, problem: Problem, options: argparse.Namespace) -> None:
    shape = problem.shape
    size = problem.lm_head.element_size()
    for side, work in itertools.product(options.sides, options.work):
        if work == "greedy" and side in SAME_GREEDY:
            continue
        row = Measurement(shape.point, work, side, shape.flops, shape.least_bytes(size))
        measure_row(session, problem, row, SIDES[side])


@torch.no_grad()
def measure_row(session: Session, problem: Problem, row: Measurement, draw: Draw) -> None:
    greedy = row.work == "greedy"
    seeds = itertools.count()

    def call() -> tuple[Tensor, Tensor]:
        return draw(problem.hidden, problem.lm_head, greedy, next(seeds))

    def check(found: Any) -> float:
        tokens, logprob = found
        expected = problem.log_probs(problem.hidden)
        error = relative_error(logprob, expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
        if greedy:  # ties within rounding are no error, so it is the log-probabilities that are compared
            return max(error, relative_error(expected.amax(-1), logprob.to(expected.dtype)))
        repeated = problem.hidden[:1].expand_as(problem.hidden).contiguous()
        drawn, _ = draw(repeated, problem.lm_head, False, next(seeds))
        far = deviation(drawn, expected[0])
        row.note = f"{far:+.1f} standard deviations from the distribution"
        return error if far <= LARGEST_DEVIATION else math.nan

    session.measure(row, lambda: call, check, LARGEST_ERROR[problem.dtype])


def targets(session: Session) -> list[Target]:
    row = session.find({"model": "mistral-7b", "N": 2048}, "sample", "triton")
    return [Target("sampling, N 2048", *bar("sampling, 2,048 rows"), False, milliseconds(row))]


def shapes(options: argparse.Namespace, on_gpu: bool) -> Iterator[Shape]:
    for model in options.models or (["mistral-7b", "small"] if on_gpu else ["tiny"]):
        for rows in options.rows or ([64] if options.quick else [2048]):
            yield Shape(model, rows, **MODELS[model])


def parser() -> KernelBenchmark:
    p = KernelBenchmark(__file__, __doc__, list(SIDES))
    what = p.add_argument_group("problems")
    what.add_argument("--models", nargs="+", choices=list(MODELS), help="heads (default: of the device)")
    what.add_argument("--rows", type=int, nargs="+", help="rows N (default: 2048)")
    what.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what is done")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    benchmark = parser()
    options = benchmark.begin(argv)
    on_gpu, dtype = options.on_gpu, options.dtype
    options.sides = options.sides or [side for side in SIDES if on_gpu or side != "triton"]
    session = benchmark.start(options, OURS)
    chosen = list(shapes(options, on_gpu))
    heads = ", ".join(
        f"{name}: V {s.vocabulary}, E {s.hidden}" for name, s in {shape.model: shape for shape in chosen}.items()
    )
    introduction = (
        f"{dtype_name(dtype)}; {heads}. What the sides and the columns are is said at the top of "
        "`benchmarks/token_sampling.py`."
    )
    with benchmark.kernel_results(session, options, "Sampling tokens from hidden states", introduction, targets):
        for shape in chosen:
            measure_shape(session, Problem(shape, dtype, session.meter.device), options)
            session.release()


if __name__ == "__main__":
    main()
