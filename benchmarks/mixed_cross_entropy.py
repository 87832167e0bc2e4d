"""The loss after the mixing head against every other way to compute it: time, throughput, memory, and the targets.

    python benchmarks/mixed_cross_entropy.py --comparators folder/with/liger_kernel/and/cut_cross_entropy

Two losses, `mixed` of two hidden states and a mixing weight, and `linear` of one state; two kinds of work, `forward`
(a loss without gradients) and `both`, forward and backward of the mean loss. Sides:

* `triton`, `torch`, `reference`: the backends of `quietstar_kernels`. `both` tells them the rows' weights beforehand
  (`row_weight=`), so that the gradients are made in the forward; `..., weights later` does not.
* `two products`: logits of both states in the model's dtype, mixed, `F.cross_entropy` in float32. `one product`: the
  same of the mixed state, or the only one.
* `liger`: Liger-Kernel's fused linear cross-entropy of the mixed state, as it is and with float32 sums for the head's
  gradient. `cce`: Apple's cut cross-entropy, as it is and without filtering gradients.
* `F.linear_cross_entropy`, where PyTorch has it, whole and in chunks.

Useful work is 2 N V E operations forward and 6 N V E with gradients, whatever a side executes. Before they are timed,
sides are checked against the reference in float32: the losses of rows, or the mean where a side gives no more, and
every gradient. The target's logit stands out as a trained model's does, so that a side that skips small gradients may.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bars import bar
from benchmarks.environment import version
from benchmarks.gpu_timing import (
    LARGEST_ERROR,
    KernelBenchmark,
    Measurement,
    NotTried,
    Session,
    Target,
    dtype_name,
    importable_from,
    milliseconds,
    times_faster,
    worst_error,
)
from quietstar_kernels import linear_cross_entropy, mixed_cross_entropy

LOSSES = ("mixed", "linear")
WORK = ("forward", "both")
OURS = ("triton", "torch", "triton, weights later", "torch, weights later")
MODELS = {
    "mistral-7b": {"vocabulary": 32002, "hidden": 4096},  # with START and END
    "small": {"vocabulary": 49152, "hidden": 576},  # SmolLM2-135M
    "tiny": {"vocabulary": 1000, "hidden": 64},
}
HEAD_STD = 0.02
TARGET_LOGIT = 8.0  # a mean loss of about three nats with 32,000 tokens
REFERENCE_LOGITS = 2**28


@dataclasses.dataclass(frozen=True)
class Shape:
    """N rows of a loss."""

    loss: str
    model: str
    rows: int
    vocabulary: int
    hidden: int

    @property
    def point(self) -> dict[str, Any]:
        return {"loss": self.loss, "model": self.model, "N": self.rows}

    def flops(self, work: str) -> int:
        return (6 if work == "both" else 2) * self.rows * self.vocabulary * self.hidden

    def least_bytes(self, work: str, size: int) -> int:
        """Of inputs and outputs, once each."""
        states = 2 if self.loss == "mixed" else 1
        tensors = (states * self.rows + self.vocabulary) * self.hidden * size
        return (2 if work == "both" else 1) * (tensors + states * 4 * self.rows) + 8 * self.rows


class Problem:
    """The tensors of one shape, and what the reference makes of them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        N, V, E = shape.rows, shape.vocabulary, shape.hidden
        self.lm_head = (HEAD_STD * torch.randn(V, E, device=device)).to(dtype)
        self.target = torch.randint(V, (N,), device=device)
        toward_target = TARGET_LOGIT / (E * HEAD_STD**2) * self.lm_head[self.target].float()
        self.hidden = [
            (toward_target + torch.randn(N, E, device=device)).to(dtype) for _ in range(2 if self.mixed else 1)
        ]
        self.weight = torch.rand(N, device=device).to(dtype)
        self.row_weight = torch.full((N,), 1 / N, device=device)  # the mean, which every side can compute

    @property
    def mixed(self) -> bool:
        return self.shape.loss == "mixed"

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """hidden (twice, then the mixing weight, where mixed) and lm_head, all with gradients."""
        floating = [*self.hidden, *([self.weight] if self.mixed else []), self.lm_head]
        if dtype is not None:
            return [x.detach().to(dtype, copy=True).requires_grad_() for x in floating]
        return [x.detach().requires_grad_() for x in floating]

    @cached_property
    def expected(self) -> dict[str, Any]:
        """`nll` [N], `loss`, and `grads` of `leaves()`, in float32."""
        leaves = self.leaves(torch.float32)
        nll = torch.empty_like(self.row_weight)
        for rows in torch.arange(self.shape.rows).split(max(1, REFERENCE_LOGITS // self.shape.vocabulary)):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            part = kernel_nll(
                self, [*(x[here] for x in leaves[:-1]), leaves[-1]], "reference", target=self.target[here]
            )
            (part * self.row_weight[here]).sum().backward()
            nll[here] = part.detach()
        return {"nll": nll, "loss": (nll * self.row_weight).sum(), "grads": [x.grad for x in leaves]}

    def state(self, inputs: Sequence[Tensor]) -> Tensor:
        """The hidden state whose loss it is: what sides get that know of no mixing."""
        if not self.mixed:
            return inputs[0]
        base, thought, weight = (x.float() for x in inputs[:3])
        return torch.lerp(base, thought, weight.unsqueeze(-1)).to(self.dtype)


# ---------------------------------------------------------------------------------------------------------- the sides
# Each takes the problem and its leaves, and returns the mean loss, or the losses of the rows.

Loss = Callable[[Problem, Sequence[Tensor]], Tensor]


def kernel_nll(problem: Problem, inputs: Sequence[Tensor], backend: str, target: Tensor | None = None) -> Tensor:
    target = problem.target if target is None else target
    head = inputs[-1]
    if problem.mixed:
        base, thought, weight = inputs[:3]
        return mixed_cross_entropy(base, thought, weight, head, target, backend=backend)
    return linear_cross_entropy(inputs[0], head, target, backend=backend)


def kernel_loss(problem: Problem, inputs: Sequence[Tensor], backend: str) -> Tensor:
    """The weighted sum, its gradients made in the forward."""
    head, options = inputs[-1], {"row_weight": problem.row_weight, "backend": backend}
    if problem.mixed:
        base, thought, weight = inputs[:3]
        loss, _ = mixed_cross_entropy(base, thought, weight, head, problem.target, **options)
    else:
        loss, _ = linear_cross_entropy(inputs[0], head, problem.target, **options)
    return loss


def two_products(problem: Problem, inputs: Sequence[Tensor]) -> Tensor:
    base, thought, weight, head = inputs
    share = weight.unsqueeze(-1)
    logits = share * (thought @ head.T) + (1 - share) * (base @ head.T)
    return F.cross_entropy(logits.float(), problem.target)


def one_product(problem: Problem, inputs: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy((problem.state(inputs) @ inputs[-1].T).float(), problem.target)


def liger(problem: Problem, inputs: Sequence[Tensor], accum_dtype: torch.dtype | None = None) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(accum_dtype=accum_dtype)(
        inputs[-1], problem.state(inputs), problem.target
    )
    return loss


def cut_cross_entropy(problem: Problem, inputs: Sequence[Tensor], filter_eps: str | None = "high") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    loss: Tensor = cce(problem.state(inputs), inputs[-1], problem.target, filter_eps=filter_eps)
    return loss


def torch_linear_cross_entropy(problem: Problem, inputs: Sequence[Tensor], chunked: bool = False) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotTried(f"torch {torch.__version__} does not have it")
    options = {}
    if chunked:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise NotTried(f"torch {torch.__version__} has no chunks")
        options["options"] = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(problem.state(inputs), inputs[-1], problem.target, **options)
    return loss


def kernel_later(problem: Problem, inputs: Sequence[Tensor], backend: str) -> Tensor:
    return (kernel_nll(problem, inputs, backend) * problem.row_weight).sum()


SIDES: dict[str, tuple[Loss, Loss]] = {
    "triton": (partial(kernel_nll, backend="triton"), partial(kernel_loss, backend="triton")),
    "triton, weights later": (
        partial(kernel_nll, backend="triton"),
        partial(kernel_later, backend="triton"),
    ),
    "torch": (partial(kernel_nll, backend="torch"), partial(kernel_loss, backend="torch")),
    "torch, weights later": (
        partial(kernel_nll, backend="torch"),
        partial(kernel_later, backend="torch"),
    ),
    "reference": (partial(kernel_nll, backend="reference"), partial(kernel_later, backend="reference")),
    "two products": (two_products, two_products),
    "one product": (one_product, one_product),
    "liger": (liger, liger),
    "liger, float32 sums": (liger, partial(liger, accum_dtype=torch.float32)),
    "cce": (cut_cross_entropy, cut_cross_entropy),
    "cce, unfiltered": (cut_cross_entropy, partial(cut_cross_entropy, filter_eps=None)),
    "F.linear_cross_entropy": (torch_linear_cross_entropy, torch_linear_cross_entropy),
    "F.linear_cross_entropy, chunks": (
        partial(torch_linear_cross_entropy, chunked=True),
        partial(torch_linear_cross_entropy, chunked=True),
    ),
}
"""Name -> what `forward` and what `both` computes."""
SAME_FORWARD = ("triton, weights later", "torch, weights later", "liger, float32 sums", "cce, unfiltered")
ON_GPU_ONLY = ("triton", "triton, weights later", "liger", "liger, float32 sums", "cce", "cce, unfiltered")


# ---------------------------------------------------------------------------------------------------------- measuring


def measure_shape(session: Session, problem: Problem, options: argparse.Namespace) -> None:
    shape = problem.shape
    for side in options.sides:
        for work in options.work:
            if (work == "forward" and side in SAME_FORWARD) or (side == "two products" and not problem.mixed):
                continue
            row = Measurement(
                shape.point, work, side, shape.flops(work), shape.least_bytes(work, problem.lm_head.element_size())
            )
            measure_row(session, problem, row, SIDES[side][WORK.index(work)])


def measure_row(session: Session, problem: Problem, row: Measurement, loss: Loss) -> None:
    inputs = problem.leaves()
    # A gradient passes a rounding more, of the logits' gradient, than a loss does.
    limit = LARGEST_ERROR[problem.dtype] * (2 if row.work == "both" else 1)

    @torch.no_grad()
    def forward() -> Tensor:
        return loss(problem, inputs)

    def both() -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(problem, inputs)
        return value.detach(), torch.autograd.grad(value, inputs)

    def check_forward(found: Any) -> float:
        name = "nll" if found.dim() else "loss"
        return worst_error({name: found}, {name: problem.expected[name]})

    def check_both(found: Any) -> float:
        value, grads = found
        wanted = dict(enumerate(problem.expected["grads"]))
        errors = worst_error({str(k): x for k, x in enumerate(grads)}, {str(k): x for k, x in wanted.items()})
        return max(errors, check_forward(value))

    if row.work == "both":
        session.measure(row, lambda: both, check_both, limit)
    else:
        session.measure(row, lambda: forward, check_forward, limit)


def targets(session: Session) -> list[Target]:
    """Of the mixed loss at Mistral-7B's size and N 8192."""
    at = {"loss": "mixed", "model": "mistral-7b", "N": 8192}
    ours = session.find(at, "both", "triton", exact=True)
    wanted = [
        Target("forward, N 8192", 3.6, 3.2, False, milliseconds(session.find(at, "forward", "triton"))),
        Target("forward + backward, N 8192", *bar("head, forward and backward, 8,192 rows"), False, milliseconds(ours)),
    ]
    for label, side, must in (
        ("Liger, faster setting", "liger", 1.25),
        ("cut cross-entropy, faster setting", "cce", 1.5),
        ("two-product PyTorch", "two products", 2.0),
    ):
        measured = times_faster(ours, session.find(at, "both", side))
        wanted.append(Target(f"forward + backward against {label}", must, None, True, measured))
    return wanted


def shapes(options: argparse.Namespace, on_gpu: bool) -> Iterator[Shape]:
    for model in options.models or (["mistral-7b", "small"] if on_gpu else ["tiny"]):
        rows = options.rows or ([32] if options.quick else [2048, 8192, 20480] if on_gpu else [512, 2048])
        if model == "small" and not options.rows:
            rows = rows[1:2] or rows
        for loss in options.losses:
            for count in rows:
                yield Shape(loss, model, count, **MODELS[model])


def parser() -> KernelBenchmark:
    p = KernelBenchmark(__file__, __doc__, list(SIDES))
    what = p.add_argument_group("problems")
    what.add_argument("--models", nargs="+", choices=list(MODELS), help="heads (default: of the device)")
    what.add_argument("--rows", type=int, nargs="+", help="rows N (default: 2048 8192 20480; CPU 512 2048)")
    what.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="which losses")
    what.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what is done")
    what.add_argument("--comparators", type=Path, help="folder with packages that are not installed")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    benchmark = parser()
    options = benchmark.begin(argv)
    on_gpu, dtype = options.on_gpu, options.dtype
    options.sides = options.sides or [side for side in SIDES if on_gpu or side not in ON_GPU_ONLY]
    session = benchmark.start(options, OURS)
    chosen = list(shapes(options, on_gpu))
    heads = ", ".join(
        f"{name}: V {s.vocabulary}, E {s.hidden}" for name, s in {shape.model: shape for shape in chosen}.items()
    )
    introduction = (
        f"{dtype_name(dtype)}; {heads}. `both` is forward and backward. What the sides and the columns are is said at "
        "the top of `benchmarks/mixed_cross_entropy.py`."
    )
    with (
        importable_from(options.comparators),
        benchmark.kernel_results(session, options, "Loss after the mixing head", introduction, targets),
    ):
        benchmark.facts |= {package: version(package) for package in ("liger-kernel", "cut-cross-entropy")}
        for shape in chosen:
            problem = Problem(shape, dtype, session.meter.device)
            measure_shape(session, problem, options)
            del problem
            session.release()


if __name__ == "__main__":
    main()
