"""What a mixed state costs that is rounded to bfloat16 before its product with lm_head, as one product alone would do.

    python benchmarks/mixed_rounding.py

The mixing head's state (1 - w) base + w thought is no bfloat16 number. The losses multiply it in two parts, rounded and
what rounding took, or put that back to first order. One product is half of the arithmetic: here the losses and the
rewards (loss of the base less that of the mixture) of both stand beside those in float64, from the same bfloat16 states
and lm_head, at mixing weights from small to large. Products are summed in float32; no GPU is wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar_kernels.logits import product, raw_logits

WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.5)


def losses(states: Tensor, head: Tensor, target: Tensor, ways: str) -> Tensor:
    """Losses [N] in float64 of mixed states in float32, with `ways` "one" or "two" products of bfloat16 operands."""
    if ways == "one":
        raw = product(states.bfloat16(), head.T, torch.float32)
    else:
        raw = raw_logits(states, head, torch.float32)
    return cross_entropy(raw, target, reduction="none").double()


def measure(rows: int, width: int, vocabulary: int, seed: int = 0) -> list[dict[str, object]]:
    """One line for each weight: errors as root mean squares, and how often the reward has the wrong sign.

    Args:
        rows: predictions, N.
        width: of a hidden state, E.
        vocabulary: V.
        seed: of the random states, whose logits have a standard deviation of 2.5.
    """
    generator = torch.Generator().manual_seed(seed)
    head = (torch.randn(vocabulary, width, generator=generator) * 2.5 * width**-0.5).bfloat16()
    base, thought = (torch.randn(rows, width, generator=generator).bfloat16() for _ in range(2))
    target = torch.randint(vocabulary, (rows,), generator=generator)
    exact_base = cross_entropy(base.double() @ head.double().T, target, reduction="none")
    base_loss = losses(base.float(), head, target, "one")  # exact but for float32: the state is a bfloat16 number
    found: list[dict[str, object]] = []
    for weight in WEIGHTS:
        share = torch.tensor(weight).bfloat16().double()  # the weight as the model holds it
        exact_states = (1 - share) * base.double() + share * thought.double()
        exact = exact_base - cross_entropy(exact_states @ head.double().T, target, reduction="none")
        line: dict[str, object] = {"weight": weight, "reward": f"{rms(exact):.2e}"}
        for ways in ("one", "two"):
            reward = base_loss - losses(exact_states.float(), head, target, ways)
            line[f"error, {ways}"] = f"{rms(reward - exact):.1e}"
            line[f"of the reward, {ways}"] = f"{rms(reward - exact) / rms(exact):.2%}"
            line[f"wrong sign, {ways}"] = f"{(reward * exact < 0).double().mean():.1%}"
        found.append(line)
    return found


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_out("mixed_rounding")
    parser.add_threads()
    parser.add_quick(rows=32, width=64, vocabulary=100)
    options = parser.begin(arguments)
    rows = measure(options.rows, options.width, options.vocabulary)
    body = (
        "Root mean squares over the rows, of the reward in float64 and of its error with one and with two products.\n\n"
        + markdown_table(tuple(rows[0]), [tuple(map(str, row.values())) for row in rows])
    )
    parser.write(options.out, "A mixed state in one bfloat16 product and in two", body, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
