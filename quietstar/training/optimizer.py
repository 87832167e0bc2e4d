"""The optimizers of a training run: parameter groups, AdamW, 8-bit AdamW.

START and END have a parameter group of their own. AdamW updates float32 masters of low-precision parameters: in
bfloat16 a weight has 8 significant bits, so at a learning rate of 1e-6 an update is lost in rounding for every weight
larger than about 5e-4. The masters collect the updates, and the parameters are rounded copies of them. With moments in
8 bits, from bitsandbytes, AdamW needs a quarter of the memory and takes the same steps to about a percent.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from quietstar.config.training import TrainingOptions
from quietstar.errors import CheckpointError, ConfigError
from quietstar.imports import without_bitsandbytes_warnings
from quietstar.model.sharding import Rows, own_part, own_rows
from quietstar.training.ranks import ALONE, Ranks

GRADIENT_NORM = "gradient_norm"
THOUGHT_EMBEDDING_GRADIENT_NORM = "thought_embedding_gradient_norm"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained in the same way.

    Args:
        name: Name of the group, such as `backbone`.
        parameters: Pairs of a name and a parameter, in the model's order.
        learning_rate_multiplier: Factor of the step's learning rate.
        weight_decay: Decoupled weight decay of the group.
        norm: Name of the gradient norm that counts this group; groups with one name are measured and clipped together.
        max_grad_norm: Largest value of that gradient norm; larger gradients are scaled down to it.
    """

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    learning_rate_multiplier: float = 1.0
    weight_decay: float = 0.0
    norm: str = GRADIENT_NORM
    max_grad_norm: float = 1.0


def build_parameter_groups(model: nn.Module, options: TrainingOptions) -> list[ParameterGroup]:
    """Sorts a model's trainable parameters into groups; a model without thoughts has fewer of them.

    START and END (`thought_embedding`) have few rows and huge gradients. In a separate group they keep 100 x the
    learning rate, which the authors' embedding scale of 100 amounts to under Adam, without dominating the norm that the
    other gradients are clipped by.

    Args:
        model: Module to train. Parameters in a submodule named `thought_embedding` or `mixing_head` form separate
            groups.
        options: Training options; multipliers, weight decay and clipping norms are used.

    Returns:
        The groups that are not empty: `backbone`, `backbone_no_decay`, `mixing_head`, `mixing_head_no_decay`,
        `thought_embedding`. Norms, biases, anything of fewer than 2 dimensions, and START and END have no weight decay.

    Raises:
        ConfigError: Nothing in the model requires a gradient.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {
        "backbone": [],
        "backbone_no_decay": [],
        "mixing_head": [],
        "mixing_head_no_decay": [],
        "thought_embedding": [],
    }
    norm_modules = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, leaf = name.rpartition(".")
        parts = module.split(".")
        if "thought_embedding" in parts:
            members["thought_embedding"].append((name, parameter))
            continue
        group = "mixing_head" if "mixing_head" in parts else "backbone"
        if parameter.ndim < 2 or leaf == "bias" or module in norm_modules:
            group += "_no_decay"
        members[group].append((name, parameter))
    if not any(members.values()):
        raise ConfigError("model: none of its parameters requires a gradient, so there is nothing to train")

    groups = []
    for group, parameters in members.items():
        if not parameters:
            continue
        thought = group == "thought_embedding"
        multiplier = 1.0
        if thought:
            multiplier = options.thought_embedding_lr_multiplier
        elif group.startswith("mixing_head"):
            multiplier = options.mixing_head_lr_multiplier
        groups.append(
            ParameterGroup(
                name=group,
                parameters=tuple(parameters),
                learning_rate_multiplier=multiplier,
                weight_decay=0.0 if thought or group.endswith("_no_decay") else options.weight_decay,
                norm=THOUGHT_EMBEDDING_GRADIENT_NORM if thought else GRADIENT_NORM,
                max_grad_norm=options.thought_embedding_max_grad_norm if thought else options.max_grad_norm,
            )
        )
    return groups


def movable_share(groups: Sequence[ParameterGroup], learning_rate: float) -> float:
    """Returns the share of the low-precision weights that an update of the size of the learning rate changes at all.

    AdamW's updates are about as large as the learning rate. An update that is added to a weight w in the weight's own
    type is lost in rounding if it is smaller than half the distance to the next number, which for
    2^e <= |w| < 2^(e+1) is 2^e * eps / 2: it changes only the weights below a power of two.

    Args:
        groups: Parameter groups from `build_parameter_groups`.
        learning_rate: Learning rate of the step, before the multipliers of the groups.

    Returns:
        Share between 0 and 1 of the weights narrower than float32; 1 if there are none.
    """
    count, movable = 0, 0
    for group in groups:
        for _, parameter in group.parameters:
            if parameter.dtype.itemsize >= 4:
                continue
            count += parameter.numel()
            if update := learning_rate * group.learning_rate_multiplier:
                limit = 2.0 ** math.ceil(math.log2(update / (torch.finfo(parameter.dtype).eps / 2)))
                movable += int((parameter.detach().abs() < limit).sum())
    return movable / count if count else 1.0


class MasterAdamW:
    """`torch.optim.AdamW` on float32 masters of bfloat16 and float16 parameters, and directly on wider ones.

    One step: `backward(loss)` once per micro-batch, then `gradient_norms()`, `clip(norms)`, `step(learning_rate)`,
    `zero_grad()`. Gradients of micro-batches are summed in float32 too: a bfloat16 sum would lose the small ones.

    Args:
        groups: Parameter groups from `build_parameter_groups`.
        betas: Decay rates of the running means of the gradient and of its square.
        epsilon: Number added to AdamW's denominator.
        master_weights: Whether low-precision parameters have float32 masters. Without them the parameters are updated
            in place, and their gradients and moments have their precision too, as in the released code's optimizer.
        gathered_dtype: Dtype that the weights of a sharded model are gathered in; None: the model is not sharded.
        total_over_shards: Function that sums a tensor over the ranks that hold the shards of the parameters.

    Raises:
        TypeError: A parameter is not a real floating-point tensor.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        master_weights: bool = True,
        gathered_dtype: torch.dtype | None = None,
        total_over_shards: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.groups = tuple(groups)
        self._total_over_shards = total_over_shards
        self._parameters: dict[str, nn.Parameter] = {}
        self._trained: dict[str, Tensor] = {}  # what AdamW updates: the master, or the parameter itself, or its shard
        for group in self.groups:
            for name, parameter in group.parameters:
                if not parameter.is_floating_point():
                    raise TypeError(f"parameter {name} is {parameter.dtype}, needs a floating-point type")
                self._parameters[name] = parameter
                narrow = parameter.dtype.itemsize < 4
                sharded = isinstance(parameter, DTensor)
                copied = narrow and master_weights and not sharded
                self._trained[name] = parameter.detach().float() if copied else own_part(parameter)
        apart = {name: tensor for name, tensor in self._trained.items() if tensor is not self._parameters[name]}
        self._shards = {name: tensor for name, tensor in apart.items() if isinstance(self._parameters[name], DTensor)}
        self._copied = {name: tensor for name, tensor in apart.items() if name not in self._shards}
        rounded = gathered_dtype is not None and gathered_dtype.itemsize < 4 and master_weights
        self._masters = self._copied | (self._shards if rounded else {})
        options = [
            {
                "params": [self._trained[name] for name, _ in group.parameters],
                "weight_decay": group.weight_decay,
                "learning_rate_multiplier": group.learning_rate_multiplier,
            }
            for group in self.groups
        ]
        self._adam = self._build_adam(options, betas, epsilon)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, a differentiable scalar, to those of the parameters and the masters.

        Where a master has one, that of its parameter is added at once, so that a pass never holds the low-precision
        gradients of all parameters beside their float32 sums; the first stay small until the pass's own memory is free.
        """
        with ExitStack() as hooks:
            for name, master in self._copied.items():
                if master.grad is not None:
                    add = partial(self.collect_gradient, name)
                    hooks.callback(self._parameters[name].register_post_accumulate_grad_hook(add).remove)
            loss.backward()
        for name in self._copied:
            self.collect_gradient(name, self._parameters[name])
        for name, shard in self._shards.items():
            gradient = self._parameters[name].grad
            shard.grad = None if gradient is None else own_part(gradient)

    @torch.no_grad()
    def collect_gradient(self, name: str, parameter: Tensor) -> None:
        """Adds the gradient of a low-precision parameter, if it has one, to that of its master, and frees it."""
        if (gradient := parameter.grad) is not None:
            master = self._copied[name]
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiplies every collected gradient by `factor`."""
        for tensor in self._trained.values():
            if tensor.grad is not None:
                tensor.grad.mul_(factor)

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, Tensor]:
        """Returns the 2-norm of the collected gradients by `ParameterGroup.norm`: float32 scalars, still on the
        device.
        """
        norms = {
            norm: get_total_norm(
                [_in_float32(tensor.grad) for tensor in self._members(norm) if tensor.grad is not None]
            )
            for norm in self._norm_limits()
        }
        if not self._shards:
            return norms
        device = next(iter(self._shards.values())).device
        squares = torch.stack([norm.to(device, torch.float64).square() for norm in norms.values()])
        return dict(zip(norms, self._total_over_shards(squares).sqrt().unbind(), strict=True))

    def first_non_finite_gradient(self, norm: str) -> str | None:
        """Returns the name of the first parameter counted by `norm` whose gradient has NaN or infinity, if one has."""
        for group in self.groups:
            for name, _ in group.parameters:
                gradient = self._trained[name].grad
                if group.norm == norm and gradient is not None and not bool(gradient.isfinite().all()):
                    return name
        return None

    @torch.no_grad()
    def clip(self, norms: Mapping[str, Tensor]) -> None:
        """Scales gradients down to the limits of their norms.

        Args:
            norms: Gradient norms that `gradient_norms` returned.
        """
        for norm, limit in self._norm_limits().items():
            clip_grads_with_norm_(self._members(norm), limit, norms[norm])

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Takes one AdamW step; then the parameters become rounded copies of their masters.

        All memory is allocated first: if it runs out, nothing has changed. After that autograd counts the weights as
        changed, even if the step fails half-way.

        Args:
            learning_rate: Learning rate of the step, before the multipliers of the groups.
        """
        for group in self._adam.param_groups:
            group["lr"] = learning_rate * group["learning_rate_multiplier"]
        for trained in self._trained.values():
            if trained.grad is not None and not self._adam.state.get(trained):
                self._adam.state[trained] = self._state_of(trained)
        try:
            self._adam.step()
        finally:
            for name, trained in self._trained.items():
                # autograd does not see the writes of fused kernels and of bitsandbytes
                torch.autograd.graph.increment_version([trained, self._parameters[name]])
        for name, master in self._copied.items():
            self._parameters[name].copy_(master)

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for name, tensor in self._trained.items():
            tensor.grad = None
            self._parameters[name].grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns all tensors that training continues from, not copied.

        Returns:
            `step.NAME` [], `exp_avg.NAME` and `exp_avg_sq.NAME` (the parameter's shape) for every parameter, zeros for
            one that has not been stepped, and float32 `master.NAME` for the low-precision ones.
        """
        tensors: dict[str, Tensor] = {}
        for name, trained in self._trained.items():
            tensors |= {f"{key}.{name}": tensor for key, tensor in self._state_of(trained).items()}
        return tensors | {f"master.{name}": master for name, master in self._masters.items()}

    def state_rows(self) -> dict[str, Rows]:
        """Returns which rows this rank holds of each tensor of `state_tensors` that belongs to a sharded parameter."""
        return {
            f"{key}.{name}": own_rows(cast(DTensor, self._parameters[name]))
            for name, shard in self._shards.items()
            for key, tensor in (("master", shard), *self._state_of(shard).items())
            if tensor.shape == shard.shape
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from `state_tensors()` of an optimizer over the same parameters. The parameters are not touched.

        Args:
            tensors: All tensors of `state_tensors()` by name; they are copied.

        Raises:
            CheckpointError: A tensor is missing, unknown, or has another shape or type; nothing has been changed then.
        """
        self._check_state_tensors(tensors)
        for name, trained in self._trained.items():
            self._set_state(trained, {key: tensors[f"{key}.{name}"] for key in self._state_of(trained)})
        for name, master in self._masters.items():
            master.copy_(tensors[f"master.{name}"])

    def _check_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Checks tensors apart from loading them, so that the state built for comparison, which may be as large, is
        freed first.
        """
        wanted = self.state_tensors()
        if missing := sorted(wanted.keys() - tensors.keys()):
            raise CheckpointError(f"optimizer state: {_some(missing)} missing: training cannot continue exactly")
        if unknown := sorted(tensors.keys() - wanted.keys()):
            raise CheckpointError(
                f"optimizer state: {_some(unknown)} unknown: it belongs to a model with other parameters"
            )
        for name, want in wanted.items():
            got = tensors[name]
            if got.shape != want.shape or got.dtype != want.dtype:
                raise CheckpointError(
                    f"optimizer state: {name} is {got.dtype} {list(got.shape)}, needs {want.dtype} {list(want.shape)}"
                )

    def _build_adam(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float
    ) -> torch.optim.Optimizer:
        fused = all(tensor.device.type in ("cpu", "cuda") for tensor in self._trained.values())
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=fused)  # every step sets lr

    def _state_of(self, trained: Tensor) -> dict[str, Tensor]:
        """Returns AdamW's state of one tensor, by the first part of its name in `state_tensors`."""
        state = self._adam.state.get(trained)
        if state:
            return {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        on_device = self._adam.defaults["fused"]  # where torch's AdamW keeps its step count
        return {
            "step": torch.zeros((), dtype=torch.float32, device=trained.device if on_device else "cpu"),
            "exp_avg": torch.zeros_like(trained, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(trained, requires_grad=False),
        }

    def _set_state(self, trained: Tensor, tensors: Mapping[str, Tensor]) -> None:
        state = self._state_of(trained)
        for key, tensor in tensors.items():
            state[key].copy_(tensor)
        self._adam.state[trained] = state

    def _norm_limits(self) -> dict[str, float]:
        return {group.norm: group.max_grad_norm for group in self.groups}

    def _members(self, norm: str) -> list[Tensor]:
        return [self._trained[name] for group in self.groups if group.norm == norm for name, _ in group.parameters]


def _in_float32(gradient: Tensor) -> Tensor:
    """Returns the gradient, or in low precision its 2-norm, in float32: a sum of squares in bfloat16 would have 8
    bits.
    """
    return gradient if gradient.dtype.itemsize >= 4 else torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest + (" is" if len(names) == 1 else " are")


NAMES = {
    "exp_avg": "state1",
    "exp_avg_scale": "absmax1",
    "exp_avg_sq": "state2",
    "exp_avg_sq_scale": "absmax2",
}
"""Names in bitsandbytes, by the names that `state_tensors` uses."""


class MasterAdamW8bit(MasterAdamW):
    """`MasterAdamW` with blockwise 8-bit moments (arXiv 2110.02861).

    `state_tensors` holds the moments as uint8 codes of the parameter's shape, and beside them `exp_avg_scale.NAME` and
    `exp_avg_sq_scale.NAME`, float32 [blocks of 256]. Parameters of less than 4096 elements, and START and END, keep
    float32 moments.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    def _build_adam(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float
    ) -> torch.optim.Optimizer:
        adam: Any = _adam_8bit()(groups, lr=0.0, betas=betas, eps=epsilon)
        for index, (group, options) in enumerate(zip(self.groups, adam.param_groups, strict=True)):
            for place, tensor in enumerate(options["params"]):
                if group.norm == THOUGHT_EMBEDDING_GRADIENT_NORM:
                    moments = {key: torch.zeros_like(tensor, dtype=torch.float32) for key in ("state1", "state2")}
                    adam.state[tensor] = {"step": 0, **moments}
                else:
                    adam.init_state(options, tensor, index, place)
        optimizer: torch.optim.Optimizer = adam
        return optimizer

    def _state_of(self, trained: Tensor) -> dict[str, Tensor]:
        state = self._adam.state[trained]
        step = torch.tensor(float(state["step"]))
        return {"step": step, **{name: state[key] for name, key in NAMES.items() if key in state}}

    def _set_state(self, trained: Tensor, tensors: Mapping[str, Tensor]) -> None:
        state = self._adam.state[trained]
        state["step"] = int(tensors["step"])
        for name, tensor in tensors.items():
            if name != "step":
                state[NAMES[name]].copy_(tensor)


def _adam_8bit() -> Any:
    try:
        with without_bitsandbytes_warnings():
            optimizers: Any = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ConfigError(
            f"training.optimizer: adamw_8bit needs bitsandbytes ({error}); pip install 'quietstar[8bit]'"
        ) from error
    return optimizers.AdamW8bit


OPTIMIZERS: dict[str, type[MasterAdamW]] = {"adamw": MasterAdamW, "adamw_8bit": MasterAdamW8bit}
"""Optimizers by their name in `training.optimizer`."""


def build_optimizer(model: nn.Module, options: TrainingOptions, ranks: Ranks = ALONE) -> MasterAdamW:
    """Returns the optimizer of `options` for the trainable parameters of `model`, which must already be on its device.

    Warns if updates go straight to low-precision weights and most of them are lost.

    Args:
        model: Module to train, which is sharded where there are several ranks.
        options: Options of the training loop.
        ranks: Processes of the run.

    Raises:
        ConfigError: Nothing in the model requires a gradient, or `training.optimizer` needs a package that is missing.
    """
    optimizer = OPTIMIZERS[options.optimizer](
        build_parameter_groups(model, options),
        betas=(options.adam_beta1, options.adam_beta2),
        epsilon=options.adam_epsilon,
        master_weights=options.master_weights,
        gathered_dtype=getattr(model, "gathered_dtype", None),
        total_over_shards=ranks.total_over_shards,
    )
    share = 1.0 if options.master_weights else movable_share(optimizer.groups, options.learning_rate)
    if share < 0.5:
        warnings.warn(
            f"training.master_weights: off, and at training.learning_rate {options.learning_rate:g} only "
            f"{100 * share:.2g} % of the low-precision weights can move: an update smaller than half the distance to "
            "the next number is lost. Turn it on, or use a larger learning rate",
            stacklevel=2,
        )
    return optimizer
