"""Two ranks do the steps and evaluations that one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quietstar.training.ranks import ALONE
from tests.distributed.launch import launched, once
from tests.distributed.steps import CASES, Case, run


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = once(tmp_path_factory, "steps of two ranks", lambda to: launched(2, "tests.distributed.steps", to))
    return {name: torch.load(Path(out) / f"{number}.pt") for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_the_step_of_one(name: str, of_two_ranks: dict[str, dict[str, Any]]) -> None:
    """In float64 to rounding; in bfloat16, where both see micro-batches of one shape, bit for bit."""
    compare(CASES[name], of_two_ranks[name])


def test_four_ranks_with_two_copies_do_the_step_of_one(tmp_path: Path) -> None:
    names = ["plain", "padding, micro-batches", "LoRA", "bfloat16"]
    launched(4, "tests.distributed.steps", tmp_path, 2, *names)
    for name in names[:3]:
        compare(CASES[name], torch.load(tmp_path / f"{list(CASES).index(name)}.pt"))
    found = torch.load(tmp_path / f"{list(CASES).index('bfloat16')}.pt")
    wanted = run(replace(CASES["bfloat16"], micro_alone=2), ALONE)
    for name, tensor in wanted["gradients"].items():  # the copies' sums are added in another order
        torch.testing.assert_close(found["gradients"][name], tensor, rtol=1e-4, atol=1e-6)


def compare(case: Case, found: dict[str, Any]) -> None:
    wanted = run(case, ALONE)
    low = case.dtype == torch.bfloat16  # the norms of gradients are sums of float32, in another order
    for step, values in enumerate(wanted["values"]):
        assert found["values"][step] == pytest.approx(values, rel=0, abs=1e-6 if low else 1e-12)
    # where NLLs are equal to rounding, a token may count to the next decile
    assert found["evaluation"] == pytest.approx(wanted["evaluation"], rel=1e-5 if low else 1e-9, abs=1e-9)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for part in ("gradients", "weights"):
        for place, tensor in wanted[part].items():
            if low:
                assert torch.equal(found[part][place], tensor), place
            else:
                limit = 1e-12 * max(1.0, float(tensor.abs().max()))
                torch.testing.assert_close(found[part][place], tensor, rtol=0, atol=limit)
