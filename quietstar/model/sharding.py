"""A thinking model whose weights lie in shards on several ranks (FSDP2).

Each decoder layer is a unit, gathered for its passes; everything else (embeddings, norm, head, START and END, mixing
head) is the unit of the whole model, because the fused losses read the head's matrix, tied or not. `call` is the one
door: a function that reads weights outside the layers is called through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from quietstar.model.layers import decoder_layers
from quietstar.model.thinking_model import ThinkingModel

P = ParamSpec("P")
ModelT = TypeVar("ModelT", bound=nn.Module)
ResultT = TypeVar("ResultT")


def shard_model(
    model: ThinkingModel, mesh: DeviceMesh, *, keep_gathered: bool = False, master_weights: bool = True
) -> None:
    """Cuts the weights of a model into shards, in place; those of low precision that are trained become float32.

    The shards in float32 are the masters of the weights, which are gathered in their own type. Gradients are summed
    over the ranks in float32, or the weights' own type where that is wider, not averaged: a rank's loss is its share of
    the step's.

    Args:
        model: Model with the same weights on every rank.
        mesh: Mesh of the ranks: [shard], or [replicate, shard] for several copies.
        keep_gathered: Whether layers stay gathered from their first pass to their backward pass.
        master_weights: Whether trained weights of low precision have shards in float32.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    reduced = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    layers: list[Any] = decoder_layers(model.decoder)

    def cut(module: nn.Module, reshard: bool) -> None:
        if master_weights:
            for parameter in module.parameters():
                if parameter.requires_grad and parameter.dtype.itemsize < 4 and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)

    for layer in layers:
        cut(layer, not keep_gathered)
    cut(model, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # FSDP's own order of prefetching counts the sampling passes, and gathers layers too many
    for before, layer in zip([layers[0], *layers], layers, strict=False):
        layer.set_modules_to_backward_prefetch([before])
    model.gathered_dtype = dtype
    model.run_gathered = _run.__get__(model)
    register_fsdp_forward_method(model, "run_gathered")


def call(
    model: ModelT, function: Callable[Concatenate[ModelT, P], ResultT], *arguments: P.args, **options: P.kwargs
) -> ResultT:
    """Calls `function(model, ...)` with the weights outside the layers gathered, where the model is sharded.

    The backward pass of what it returns has to be outside.
    """
    if not isinstance(model, FSDPModule) or getattr(model, "inside", False):
        return function(model, *arguments, **options)
    result: ResultT = model.run_gathered(function, *arguments, **options)
    return result


def _run(model: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    model.inside = True
    try:
        return function(model, *arguments, **options)
    finally:
        model.inside = False


def own_part(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank holds, in the same memory: all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


Rows = tuple[int, int, int]
"""First row that a rank holds of a tensor, the one after its last, and the number of all rows."""


def own_rows(tensor: DTensor) -> Rows:
    """Returns which rows of a sharded tensor this rank holds."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    ranks = mesh.size(mesh.ndim - 1)
    each = -(-rows // ranks)  # as torch.chunk cuts them
    first = min(mesh.get_local_rank(mesh.ndim - 1) * each, rows)
    return first, first + tensor.to_local().shape[0], rows


def gathered_dtype(model: nn.Module, tensor: Tensor) -> torch.dtype:
    """Returns the dtype of a tensor of a model, of a sharded one that it is gathered in."""
    dtype: torch.dtype = getattr(model, "gathered_dtype", tensor.dtype) if isinstance(tensor, DTensor) else tensor.dtype
    return dtype


def copy_rows(own: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor into one of the model, of which a rank may hold only some rows."""
    if isinstance(own, DTensor):
        first, stop, _ = own_rows(own)
        tensor = tensor[first:stop]
    own_part(own).copy_(tensor)


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, which every rank asks for at the same time."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        gathered: Tensor = tensor.full_tensor()
    return gathered
