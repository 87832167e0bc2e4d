"""Tensors without memory, and what the ledger says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar.planning.meta_tensors import Ledger, MetaTensors, replaced

KILO = 1024


def meta() -> tuple[Ledger, MetaTensors]:
    ledger = Ledger()
    return ledger, MetaTensors(ledger, {})


def test_a_peak_is_what_is_alive_at_a_time() -> None:
    ledger, mode = meta()
    with mode:
        with ledger.labelled("first", "making"):
            x = torch.empty(KILO, KILO)
        with ledger.labelled("second", "adding"):
            y = x + 1
            z = y * 2
            del y
            z = z - 1
    assert x.shape == z.shape == (KILO, KILO)
    size = 4 * KILO**2
    assert ledger.total == 2 * size
    assert ledger.peaks["adding", ""] == {"first": size, "second": 2 * size}
    assert ledger.largest == {"first": size, "second": 2 * size}
    del x, z
    assert ledger.total == 0


def test_views_take_nothing_and_tied_storages_count_once() -> None:
    ledger, mode = meta()
    with mode:
        x = torch.empty(8, 16)
        view = x.t()[2:][:, ::2].unsqueeze(0)
    assert view.untyped_storage().nbytes() == ledger.total == 8 * 16 * 4


def test_a_model_larger_than_the_machine_takes_no_memory() -> None:
    ledger, mode = meta()
    with mode:
        x = torch.zeros(2**20, 2**20, requires_grad=True)
        (x * 2).sum().backward()
        assert x.grad is not None
        assert float(x.detach().sum()) == 0.0
    assert ledger.total >= 2 * 2**42


def test_whole_numbers_keep_their_values() -> None:
    _, mode = meta()
    with mode:
        index = torch.tensor([3, 1, 2])
        assert (index.sort().values + 1).tolist() == [2, 3, 4]
        table = torch.empty(10, 4)
        assert table[index].shape == (3, 4)
        assert table.argmax(-1).tolist() == [0] * 10
        chosen = torch.empty(2, 12).topk(4).indices
    assert chosen.tolist() == [[0, 3, 6, 9]] * 2  # at equal distances, as uncertain positions may lie


def test_products_and_moved_bytes_are_noted() -> None:
    ledger, mode = meta()
    with mode:
        left, right = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(5, 7, dtype=torch.bfloat16)
        ledger.restart()
        with ledger.labelled(part="product"):
            left @ right
    ((work, times),) = ledger.work["product"].items()
    assert (work.flops, work.bytes, work.dtype, times) == (2 * 3 * 5 * 7, 2 * (15 + 35 + 21), torch.bfloat16, 1)


class Operations(TorchDispatchMode):
    """Counts the operations on real tensors that are not views, by the memory of their results."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
        self.count += func._schema.is_mutable or result.data_ptr() not in read
        return result


STEPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "product": lambda x: x @ x.mT,
    "norm": lambda x: torch.nn.functional.rms_norm(x, (5,)),
    "softmax": lambda x: x.softmax(-1) * x,
    "gate": lambda x: torch.nn.functional.silu(x) * x,
    "in place": lambda x: (x * 2).add_(1).exp_(),
    "views": lambda x: x.mT.unsqueeze(0).sum(1),
    "another type": lambda x: x.bfloat16().mul(3).float(),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_only_operations_are_work(step: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A backward pass asks each tensor for its device, and each question counted as reading the whole tensor."""

    def run() -> None:
        x = torch.ones(4, 5, requires_grad=True)
        step(x).sum().backward()

    with Operations() as real:
        run()
    ledger, mode = meta()
    with mode:
        run()
    assert sum(ledger.work["other"].values()) == real.count


def test_a_cumulative_sum_in_another_type_converts_its_whole_input_first() -> None:
    """The float64 sum that sampling inverts takes two such tensors at a time; only one of them is a result."""
    ledger, mode = meta()
    with mode:
        x = torch.empty(100, 100)
        y = x.cumsum(-1, dtype=torch.float64)
    assert ledger.total == 12 * 100**2
    assert ledger.peaks["other", ""].total() == 20 * 100**2
    assert y.dtype == torch.float64


def test_a_replaced_attribute_comes_back_after_an_error() -> None:
    class Owner:
        value = 1

    try:
        with replaced(Owner, "value", 2):
            assert Owner.value == 2
            raise KeyError
    except KeyError:
        pass
    assert Owner.value == 1
