"""Master weights, parameter groups, clipping, and the optimizer's own state."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from quietstar.errors import CheckpointError, ConfigError
from quietstar.training.optimizer import (
    MasterAdamW,
    ParameterGroup,
    build_optimizer,
    build_parameter_groups,
    movable_share,
)
from tests.training.helpers import ToyThinker, options, tiny_llama


def _group(parameter: nn.Parameter, **changes: float) -> ParameterGroup:
    return ParameterGroup("all", (("weight", parameter),), **changes)


def _give_gradients(model: nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (scale * gradient).to(parameter.dtype)


def _one_step(optimizer: MasterAdamW, learning_rate: float) -> None:
    """A step with the gradients that the parameters have, as a backward pass gives them."""
    terms = []
    for group in optimizer.groups:
        for _, parameter in group.parameters:
            if parameter.grad is not None:
                terms.append((parameter * parameter.grad).sum().float())
                parameter.grad = None
    optimizer.backward(torch.stack(terms).sum())
    optimizer.clip(optimizer.gradient_norms())
    optimizer.step(learning_rate)
    optimizer.zero_grad()


def test_small_updates_move_bfloat16_weights_that_pure_bfloat16_adamw_leaves_where_they_are() -> None:
    """The released code trains bfloat16 weights in place at 1e-6, so every weight above 5e-4 stays what it was."""
    start = torch.full((8, 8), 0.02, dtype=torch.bfloat16)
    pure = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([pure], lr=1e-6, weight_decay=0.0)
    kept = nn.Parameter(start.clone())
    optimizer = MasterAdamW([_group(kept, max_grad_norm=1e9)])
    for _ in range(100):
        pure.grad = torch.ones_like(pure)
        adamw.step()
        kept.grad = torch.ones_like(kept)
        _one_step(optimizer, 1e-6)
    assert torch.equal(pure.detach(), start)
    master = optimizer.state_tensors()["master.weight"]
    torch.testing.assert_close(master, start.float() - 1e-4, rtol=0, atol=1e-7)
    assert torch.equal(kept.detach(), master.bfloat16())
    assert bool((kept < start).all())


@pytest.mark.parametrize("settings", [(0.9, 0.999, 1e-8), (0.7, 0.9, 0.1)])
def test_bfloat16_steps_are_those_of_float32_adamw_on_the_same_gradients(settings: tuple[float, float, float]) -> None:
    """And after every step each weight is its master, rounded; norms too, which have one dimension."""
    beta1, beta2, epsilon = settings
    low, high = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16).float()
    given = options(weight_decay=0.1, max_grad_norm=1e9, adam_beta1=beta1, adam_beta2=beta2, adam_epsilon=epsilon)
    optimizer = build_optimizer(low, given)
    decayed = {id(p) for g in build_parameter_groups(high, given) if g.weight_decay for _, p in g.parameters}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in high.parameters() if id(p) in decayed], "weight_decay": 0.1},
            {"params": [p for p in high.parameters() if id(p) not in decayed], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(beta1, beta2),
        eps=epsilon,
    )
    for step in range(3):
        _give_gradients(low, scale=step + 1.0)
        for ours, theirs in zip(low.parameters(), high.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.float()
        _one_step(optimizer, 1e-3)
        adamw.step()
    state = optimizer.state_tensors()
    for name, parameter in high.named_parameters():
        torch.testing.assert_close(state[f"master.{name}"], parameter.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(low.get_parameter(name), state[f"master.{name}"].bfloat16()), name


def test_float32_and_float64_parameters_have_no_second_copy() -> None:
    for dtype in (torch.float32, torch.float64):
        model = tiny_llama(dtype)
        optimizer = build_optimizer(model, options())
        assert not any(name.startswith("master.") for name in optimizer.state_tensors())
        before = model.lm_head.weight.detach().clone()
        _give_gradients(model)
        _one_step(optimizer, 1e-2)
        assert not torch.equal(model.lm_head.weight.detach(), before)


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    """In bfloat16 1 + 256 * 2**-9 stays 1, for each term is below half a unit in the last place."""
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([_group(parameter)])
    for value in [1.0] + [2.0**-9] * 256:
        optimizer.backward((parameter * value).sum())
        assert parameter.grad is None
    assert float(optimizer.gradient_norms()["gradient_norm"]) == pytest.approx(2 * 1.5)


def test_groups_of_a_thinking_model() -> None:
    given = options(
        weight_decay=0.1,
        thought_embedding_lr_multiplier=50.0,
        thought_embedding_max_grad_norm=0.5,
        mixing_head_lr_multiplier=3.0,
    )
    groups = {group.name: group for group in build_parameter_groups(ToyThinker(), given)}
    names = {name: [parameter for parameter, _ in group.parameters] for name, group in groups.items()}
    assert names == {
        "backbone": ["base.weight"],
        "backbone_no_decay": ["base.bias", "norm.weight", "norm.bias"],
        "mixing_head": ["mixing_head.0.weight", "mixing_head.2.weight"],
        "mixing_head_no_decay": ["mixing_head.0.bias"],
        "thought_embedding": ["thought_embedding.weight"],
    }
    assert {name: group.weight_decay for name, group in groups.items() if group.weight_decay} == {
        "backbone": 0.1,
        "mixing_head": 0.1,
    }
    assert {name: group.learning_rate_multiplier for name, group in groups.items()} == {
        "backbone": 1.0,
        "backbone_no_decay": 1.0,
        "mixing_head": 3.0,
        "mixing_head_no_decay": 3.0,
        "thought_embedding": 50.0,
    }
    assert groups["thought_embedding"].max_grad_norm == 0.5


def test_groups_of_a_plain_model_hold_every_parameter_once() -> None:
    for tied in (False, True):
        model = tiny_llama(tied=tied)
        groups = build_parameter_groups(model, options())
        assert [group.name for group in groups] == ["backbone", "backbone_no_decay"]
        found = [id(parameter) for group in groups for _, parameter in group.parameters]
        assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
        assert all("norm" in name for name, _ in groups[1].parameters)


def test_a_norm_over_several_dimensions_has_no_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((4, 4)))
    groups = {group.name: [name for name, _ in group.parameters] for group in build_parameter_groups(model, options())}
    assert groups == {"backbone": ["0.weight"], "backbone_no_decay": ["0.bias", "1.weight", "1.bias"]}


def test_frozen_parameters_are_left_out() -> None:
    model = ToyThinker()
    model.base.requires_grad_(False)
    names = [name for group in build_parameter_groups(model, options()) for name, _ in group.parameters]
    assert "base.weight" not in names
    assert "norm.weight" in names
    with pytest.raises(ConfigError, match="none of its parameters requires a gradient"):
        build_parameter_groups(model.requires_grad_(False), options())


def test_multipliers_scale_the_first_step() -> None:
    """Adam's first step is the learning rate in every coordinate."""
    model = ToyThinker()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        model, options(weight_decay=0.0, thought_embedding_lr_multiplier=100.0, mixing_head_lr_multiplier=7.0)
    )
    _give_gradients(model)
    _one_step(optimizer, 1e-4)
    for name, factor in (("base.weight", 1.0), ("mixing_head.0.weight", 7.0), ("thought_embedding.weight", 100.0)):
        moved = (model.get_parameter(name).detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-4 * factor), rtol=1e-2, atol=1e-7)


def _all_gradients(model: nn.Module, leave_out: str) -> Tensor:
    gradients = [
        p.grad.flatten() for name, p in model.named_parameters() if leave_out not in name and p.grad is not None
    ]
    return torch.cat(gradients)


def test_the_thought_embedding_is_clipped_by_itself() -> None:
    """One huge START gradient must not scale everything else down to nothing."""
    model = ToyThinker()
    optimizer = build_optimizer(model, options(max_grad_norm=1e9, thought_embedding_max_grad_norm=0.25))
    _give_gradients(model)
    model.thought_embedding.weight.grad = torch.full((2, 4), 1e6)
    others = _all_gradients(model, leave_out="thought_embedding").clone()
    norms = optimizer.gradient_norms()
    assert float(norms["thought_embedding_gradient_norm"]) == pytest.approx(1e6 * 8**0.5)
    assert float(norms["gradient_norm"]) == pytest.approx(float(others.norm()), rel=1e-6)
    optimizer.clip(norms)
    assert torch.equal(_all_gradients(model, leave_out="thought_embedding"), others)
    assert float(model.thought_embedding.weight.grad.norm()) == pytest.approx(0.25, rel=1e-5)


def test_everything_else_shares_one_norm() -> None:
    model = ToyThinker()
    optimizer = build_optimizer(model, options(max_grad_norm=0.5, thought_embedding_max_grad_norm=1e9))
    _give_gradients(model)
    assert model.thought_embedding.weight.grad is not None
    thought = model.thought_embedding.weight.grad.clone()
    optimizer.clip(optimizer.gradient_norms())
    assert float(_all_gradients(model, leave_out="thought_embedding").norm()) == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(model.thought_embedding.weight.grad, thought)


def test_gradients_below_the_limit_are_not_touched() -> None:
    model = ToyThinker()
    optimizer = build_optimizer(model, options(max_grad_norm=100.0, thought_embedding_max_grad_norm=100.0))
    _give_gradients(model)
    before = _all_gradients(model, leave_out="nothing").clone()
    optimizer.clip(optimizer.gradient_norms())
    assert torch.equal(_all_gradients(model, leave_out="nothing"), before)


def test_the_parameter_with_a_bad_gradient_is_named() -> None:
    model = ToyThinker()
    optimizer = build_optimizer(model, options())
    _give_gradients(model)
    assert optimizer.first_non_finite_gradient("gradient_norm") is None
    assert model.norm.bias.grad is not None
    model.norm.bias.grad[2] = float("inf")
    assert optimizer.first_non_finite_gradient("gradient_norm") == "norm.bias"
    assert optimizer.first_non_finite_gradient("thought_embedding_gradient_norm") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_with_restored_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    optimizer = build_optimizer(model, options())
    for _ in range(2):
        _give_gradients(model)
        _one_step(optimizer, 1e-3)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    other = tiny_llama(dtype)
    other.load_state_dict(model.state_dict())
    continued = build_optimizer(other, options())
    continued.load_state_tensors(saved)
    for each, its_optimizer in ((model, optimizer), (other, continued)):
        _give_gradients(each, scale=0.3)
        _one_step(its_optimizer, 1e-3)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, continued.state_tensors()[name]), name
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_without_gradient_has_zero_state_and_can_be_restored() -> None:
    model = ToyThinker()
    optimizer = build_optimizer(model, options())
    _give_gradients(model)
    model.thought_embedding.weight.grad = None
    _one_step(optimizer, 1e-3)
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    assert float(state["step.thought_embedding.weight"]) == 0.0
    assert float(state["step.base.weight"]) == 1.0
    other = build_optimizer(ToyThinker(), options())
    other.load_state_tensors(state)
    for name, tensor in other.state_tensors().items():
        assert torch.equal(tensor, state[name])


def test_state_of_another_model_is_refused() -> None:
    optimizer = build_optimizer(ToyThinker(), options())
    state = optimizer.state_tensors()
    without = {name: tensor for name, tensor in state.items() if name != "exp_avg.norm.bias"}
    with pytest.raises(CheckpointError, match=r"exp_avg\.norm\.bias is missing"):
        optimizer.load_state_tensors(without)
    with pytest.raises(CheckpointError, match=r"step\.other is unknown"):
        optimizer.load_state_tensors(state | {"step.other": torch.zeros(())})
    with pytest.raises(CheckpointError, match=r"exp_avg\.base\.bias is torch.float32 \[3\], needs torch.float32 \[4\]"):
        optimizer.load_state_tensors(state | {"exp_avg.base.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"exp_avg\.base\.bias is torch.bfloat16"):
        optimizer.load_state_tensors(state | {"exp_avg.base.bias": torch.zeros(4, dtype=torch.bfloat16)})


# -- without master weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deviation", "expected"), [(0.02, 0.02), (0.005, 0.08), (0.002, 0.19)])
def test_the_share_of_bfloat16_weights_that_can_move(deviation: float, expected: float) -> None:
    """What is announced is what one step does: 2 % of the weights of a usual initialisation at 1e-6."""
    generator = torch.Generator().manual_seed(0)
    start = (deviation * torch.randn(512, 512, generator=generator)).bfloat16()
    group = _group(nn.Parameter(start.clone()), max_grad_norm=1e9)
    optimizer = MasterAdamW([group], master_weights=False)
    parameter = group.parameters[0][1]
    parameter.grad = torch.randn(start.shape, generator=generator).bfloat16()
    share = movable_share([group], 1e-6)
    _one_step(optimizer, 1e-6)
    assert share == pytest.approx(expected, rel=0.05)
    assert float((parameter.detach() != start).float().mean()) == pytest.approx(share, rel=0.05)


def test_the_share_counts_multipliers_and_low_precision_alone() -> None:
    weights = nn.Parameter(torch.full((10,), 0.01, dtype=torch.bfloat16))
    assert movable_share([_group(weights)], 1e-6) == 0.0
    assert movable_share([_group(weights, learning_rate_multiplier=100.0)], 1e-6) == 1.0
    assert movable_share([_group(weights, learning_rate_multiplier=0.0)], 1e-6) == 0.0
    assert movable_share([_group(nn.Parameter(torch.ones(3)))], 1e-6) == 1.0
    halves = nn.Parameter(torch.full((10,), 0.01, dtype=torch.float16))  # 3 bits more than bfloat16
    assert movable_share([_group(halves)], 1e-5) == 1.0


def test_training_without_masters_is_announced_where_weights_stay() -> None:
    model = tiny_llama(torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"training\.master_weights: off, and at training\.learning_rate 1e-06 only"
    ) as seen:
        optimizer = build_optimizer(model, options(master_weights=False, learning_rate=1e-6))
    share = 100 * movable_share(optimizer.groups, 1e-6)
    assert f"only {share:.2g} % of the" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_optimizer(model, options(master_weights=False, learning_rate=1e-2))
        build_optimizer(model, options(learning_rate=1e-6))
        build_optimizer(tiny_llama(), options(master_weights=False, learning_rate=1e-6))


def test_without_masters_it_is_plain_adamw() -> None:
    ours, theirs = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    optimizer = build_optimizer(ours, options(master_weights=False, weight_decay=0.0, max_grad_norm=1e9))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    for _ in range(2):
        _give_gradients(ours)
        _give_gradients(theirs)
        _one_step(optimizer, 1e-2)
        adamw.step()
    for mine, plain in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, plain)
    state = optimizer.state_tensors()
    assert not any(name.startswith("master.") for name in state)
    assert state["exp_avg.lm_head.weight"].dtype == torch.bfloat16


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_8_bits() -> None:
    parameter = nn.Parameter(torch.zeros(3, 1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([_group(parameter)], master_weights=False)
    parameter.grad = torch.ones_like(parameter)
    norm = optimizer.gradient_norms()["gradient_norm"]
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(3**0.5, rel=1e-6)


def test_parameters_that_are_not_numbers_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight is torch\.int64"):
        MasterAdamW([_group(parameter)])


def test_a_backward_pass_never_holds_all_low_precision_gradients() -> None:
    """At 7B they are 13.6 GiB beside their float32 sums."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16) for _ in range(6)))
    optimizer = MasterAdamW([ParameterGroup("all", tuple(layers.named_parameters()))])
    alive: list[int] = []

    def count(module: nn.Module, *gradients: object) -> None:
        alive.append(sum(parameter.grad is not None for parameter in layers.parameters()))

    for layer in layers:
        layer.register_full_backward_hook(count)
    x = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    optimizer.backward(layers(x).sum().float())
    assert len(alive) == 6 and max(alive) >= 5  # the first ones, which have no sums beside them
    alive.clear()
    optimizer.backward(layers(x).sum().float())
    assert len(alive) == 6 and max(alive) <= 1
    assert not [hook for p in layers.parameters() for hook in (p._post_accumulate_grad_hooks or {})]
    reference = [p.detach().clone().requires_grad_() for p in layers.parameters()]
    y = x
    for weight in reference:
        y = y @ weight.T
    y.sum().float().backward()
    theirs = torch.stack([p.grad.float() for p in reference if p.grad is not None]).norm()
    torch.testing.assert_close(optimizer.gradient_norms()["gradient_norm"], 2 * theirs)
