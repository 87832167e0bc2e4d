"""Copies of anchors and paddings: made once, renewed after a write, gone with their tensor."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from quietstar_kernels import positions
from quietstar_kernels.positions import Positions, positions_of
from tests.kernels.attention_cases import random_case


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Positions]]:
    """The copies that were made, which the list does not keep alive."""
    copies: list[weakref.ref[Positions]] = []
    create = Positions.__init__

    def counted(self: Positions, *arguments: Any) -> None:
        create(self, *arguments)
        copies.append(weakref.ref(self))

    monkeypatch.setattr(Positions, "__init__", counted)
    return copies


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_copies_hold_the_values(dtype: torch.dtype) -> None:
    tensor = torch.arange(12, dtype=dtype).view(3, 4).T  # not contiguous
    found = positions_of(tensor)
    assert found.host.dtype == torch.int64 and torch.equal(found.host, tensor.long())
    on_device = found.on(torch.device("cpu"))
    assert on_device.dtype == torch.int32 and on_device.is_contiguous() and torch.equal(on_device, tensor.int())
    assert found.on(torch.device("cpu")) is on_device


def test_once_for_each_tensor(made: list[Any]) -> None:
    first, second = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])  # equal, but not the same
    for _ in range(3):
        assert positions_of(first) is positions_of(first)
        positions_of(second)
    assert len(made) == 2


def test_again_after_a_write(made: list[Any]) -> None:
    tensor = torch.tensor([0, 1, 2])
    positions_of(tensor)
    tensor[1] = 7
    assert positions_of(tensor).host.tolist() == [0, 7, 2]
    tensor[2:].add_(8)  # a write through a view
    assert positions_of(tensor).host.tolist() == [0, 7, 10]
    assert len(made) == 3


def test_a_copy_is_not_a_view() -> None:
    """On a CPU an int64 tensor would be its own copy, and its int32 twin be written behind the check."""
    tensor = torch.tensor([0, 1, 2])
    found = positions_of(tensor)
    tensor[0] = 9
    assert found.host[0] == 0 and found.on(torch.device("cpu"))[0] == 0


def test_nothing_is_kept_of_a_tensor_that_is_gone(made: list[Any]) -> None:
    gc.collect()  # what earlier tests left
    before = len(positions._KEPT)
    tensor = torch.tensor([0, 1, 2])
    positions_of(tensor)
    assert len(positions._KEPT) == before + 1
    del tensor
    gc.collect()
    assert len(positions._KEPT) == before and made[0]() is None


def test_in_inference_mode(made: list[Any]) -> None:
    """Its tensors count no writes, so their copies are not kept; those made outside are."""
    ordinary = torch.tensor([0, 1, 2])
    with torch.inference_mode():
        tensor = torch.tensor([0, 1, 2])
        positions_of(tensor)
        tensor[0] = 5
        assert positions_of(tensor).host.tolist() == [5, 1, 2]
        positions_of(ordinary)
        positions_of(ordinary)
    assert len(made) == 3


def test_all_layers_of_a_step_share_one_copy_and_one_check(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(start="text")
    checks: list[torch.Tensor] = []
    aminmax = torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda x: (checks.append(x), aminmax(x))[1])
    for _ in range(4):
        case.run("torch")
    assert len(made) == 2 and len(checks) == 1  # anchor and text_start; anchor's values

    case.anchor[-1] = 6
    case.run("torch")
    assert len(made) == 3 and len(checks) == 2


def test_a_check_holds_for_one_length_of_the_text() -> None:
    """Anchors that fit a long text do not fit a shorter one."""
    case = random_case(L=9)
    case.anchor = torch.tensor([0, 1, 2, 3, 4, 8])
    case.run("reference")
    q, k_text, v_text, k_thought, v_thought = case.tensors
    with pytest.raises(ValueError, match=r"anchor: got 8, wanted text positions 0 <= anchor < L=5"):
        case.run("reference", [q, k_text[:, :5], v_text[:, :5], k_thought, v_thought])


def test_a_write_is_checked() -> None:
    case = random_case()
    case.run("torch")
    case.anchor[0] = 99
    with pytest.raises(ValueError, match=r"anchor: got 99"):
        case.run("torch")
