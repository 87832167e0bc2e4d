"""Moments in 8 bits: a quarter of the memory, the steps of AdamW, an exact resume."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor, nn

from quietstar.errors import CheckpointError, ConfigError
from quietstar.imports import without_bitsandbytes_warnings
from quietstar.training.optimizer import (
    THOUGHT_EMBEDDING_GRADIENT_NORM,
    MasterAdamW,
    MasterAdamW8bit,
    ParameterGroup,
    build_optimizer,
)
from tests.training.helpers import ToyThinker, options

pytest.importorskip("bitsandbytes", reason="the 8-bit optimizer is an extra")

SHAPES = {"large": (64, 80), "odd": (4099,), "small": (64, 63)}


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype)) for name, shape in SHAPES.items()
    }


def optimizer_of(members: dict[str, nn.Parameter], kind: type[MasterAdamW], **arguments: bool) -> MasterAdamW:
    group = ParameterGroup("all", tuple(members.items()), weight_decay=0.1, max_grad_norm=1e9)
    return kind([group], betas=(0.9, 0.99), **arguments)


def step(members: dict[str, nn.Parameter], optimizer: MasterAdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in members.values()]
    terms = [(p * gradient).sum().float() for p, gradient in zip(members.values(), gradients, strict=True)]
    optimizer.backward(torch.stack(terms).sum())
    optimizer.clip(optimizer.gradient_norms())
    optimizer.step(1e-3)
    optimizer.zero_grad()


def size(tensors: dict[str, Tensor], name: str) -> int:
    return sum(
        tensor.numel() * tensor.itemsize
        for key, tensor in tensors.items()
        if key.startswith("exp_avg") and key.endswith(f".{name}")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_adamw(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    eight, full = optimizer_of(ours, MasterAdamW8bit), optimizer_of(theirs, MasterAdamW)
    start = {name: parameter.detach().float().clone() for name, parameter in ours.items()}
    for seed in range(5):
        step(ours, eight, seed)
        step(theirs, full, seed)
    for name in SHAPES:
        mine, wanted = (
            optimizer.state_tensors().get(f"master.{name}", members[name].detach()) - start[name]
            for optimizer, members in ((eight, ours), (full, theirs))
        )
        error = float((mine - wanted).norm() / wanted.norm())
        assert error < (1e-5 if name == "small" else 0.03), name
        assert name == "small" or error > 1e-5, name


def test_moments_take_a_quarter() -> None:
    members = parameters(torch.bfloat16)
    state = optimizer_of(members, MasterAdamW8bit).state_tensors()
    for name in ("large", "odd"):
        assert state[f"exp_avg.{name}"].dtype == torch.uint8
        float32_size = 2 * 4 * members[name].numel()
        assert 0.25 <= size(state, name) / float32_size < 0.26
    assert state["exp_avg.small"].dtype == torch.float32
    assert size(state, "small") == 2 * 4 * members["small"].numel()
    assert state["master.large"].dtype == torch.float32


def test_start_and_end_keep_float32_moments() -> None:
    weight = nn.Parameter(torch.zeros(2, 4096))
    group = ParameterGroup("thought_embedding", (("weight", weight),), norm=THOUGHT_EMBEDDING_GRADIENT_NORM)
    optimizer = MasterAdamW8bit([group])
    assert optimizer.state_tensors()["exp_avg.weight"].dtype == torch.float32
    weight.grad = torch.ones_like(weight)
    optimizer.step(1e-2)
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, -1e-2).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    members = parameters(dtype)
    optimizer = optimizer_of(members, MasterAdamW8bit)
    for seed in range(2):
        step(members, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    assert float(saved["step.large"]) == 2
    others = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in members.items()}
    continued = optimizer_of(others, MasterAdamW8bit)
    continued.load_state_tensors(saved)
    for seed in range(2, 4):
        step(members, optimizer, seed)
        step(others, continued, seed)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, continued.state_tensors()[name]), name
    for name, parameter in members.items():
        assert torch.equal(parameter, others[name]), name


def test_state_of_the_other_optimizer_is_refused() -> None:
    members = parameters(torch.float32)
    eight, full = optimizer_of(members, MasterAdamW8bit), optimizer_of(members, MasterAdamW)
    with pytest.raises(CheckpointError, match=r"exp_avg_scale\.large, .* missing"):
        eight.load_state_tensors(full.state_tensors())
    with pytest.raises(CheckpointError, match=r"exp_avg_scale\.large.* unknown"):
        full.load_state_tensors(eight.state_tensors())


def test_a_step_is_seen_by_whoever_watches_the_weights() -> None:
    """A recording of the sampling pass is thrown away when a weight's version has changed."""
    members = parameters(torch.float32)
    optimizer = optimizer_of(members, MasterAdamW8bit)
    before = {name: parameter._version for name, parameter in members.items()}
    step(members, optimizer, 0)
    assert all(parameter._version > before[name] for name, parameter in members.items())


def test_the_option_chooses_it() -> None:
    optimizer = build_optimizer(ToyThinker(), options(optimizer="adamw_8bit"))
    assert isinstance(optimizer, MasterAdamW8bit)
    assert type(build_optimizer(ToyThinker(), options())) is MasterAdamW


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"training\.optimizer: adamw_8bit needs bitsandbytes.*'quietstar\[8bit\]'"):
        build_optimizer(ToyThinker(), options(optimizer="adamw_8bit"))


def test_its_import_warnings_are_held_back_and_the_logger_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends")
    with pytest.raises(ImportError), without_bitsandbytes_warnings():
        logger.warning("held back")
        raise ImportError
    logger.warning("heard")
    assert caplog.messages == ["heard"]
