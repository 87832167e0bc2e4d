"""The processes of one training run: one, or the ranks that torchrun starts, and what they say to one another.

`join_ranks` is read first. All ranks read the same batch, and each takes its share of the texts; the weights are cut by
`quietstar.model.sharding`. What ranks must agree on goes through `Ranks`, in the same order on each of them.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch exports it without saying so
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from quietstar.config.distributed import DistributedOptions, world
from quietstar.errors import CheckpointError, ConfigError

REPLICATE, SHARD = "replicate", "shard"
"""Names of the dimensions of the mesh: copies of the model, and the ranks that one copy is sharded over."""

PATIENCE = datetime.timedelta(hours=6)
"""How long ranks wait for one that works alone, as the first does on a checkpoint; of one that has ended they know."""


class Ranks:
    """One process alone, or one of the ranks of a run.

    Args:
        mesh: Mesh of all ranks, with the dimensions `REPLICATE` and `SHARD`; None: one process alone.
        group: Group of all ranks, of the backend gloo: what they say to one another does not wait for a GPU.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        leads: Whether this process writes the files of the run, which is rank 0.
        mesh: Mesh of all ranks; None for one process alone.
    """

    def __init__(self, mesh: DeviceMesh | None = None, group: dist.ProcessGroup | None = None) -> None:
        self.mesh = mesh
        self.rank = 0 if mesh is None else dist.get_rank()
        self.size = 1 if mesh is None else dist.get_world_size()
        self.leads = self.rank == 0
        self._group = group

    @property
    def model_mesh(self) -> DeviceMesh:
        """Mesh that a model is sharded over: without the dimension of copies where there is one copy."""
        assert self.mesh is not None
        return self.mesh[SHARD] if self.mesh.size(0) == 1 else self.mesh

    def for_a_thread(self) -> Ranks:
        """Returns the same ranks for another thread, whose exchanges do not mix with those of this one."""
        return self if self.mesh is None else Ranks(self.mesh, dist.new_group(backend="gloo", timeout=PATIENCE))

    def share(self, texts: int) -> range:
        """Returns the places of this rank's texts among so many; those that do not divide are in nobody's share."""
        count = texts // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over all ranks; each gives one of the same shape."""
        if self.mesh is None:
            return values
        summed = values.to("cpu", copy=True)
        dist.all_reduce(summed, group=self._group)
        return summed.to(values.device)

    def total_over_shards(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over the ranks that hold the shards of this rank's copy of the model."""
        if self.mesh is None:
            return values
        summed = values.clone()
        dist.all_reduce(summed, group=self.mesh.get_group(SHARD))
        return summed

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks one after another, along their first dimension, where their sizes differ."""
        if self.mesh is None:
            return tensor
        lengths = [int(length) for length in self._all(torch.tensor([len(tensor)]))]
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = self._all(padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def together(self, work: Callable[[], Any], of_the_first: bool = False) -> list[Any]:
        """Does something on every rank and returns each one's plain JSON value; where one fails, all do.

        Args:
            work: Function that does it.
            of_the_first: Whether only rank 0 does it; the others' values are None.

        Raises:
            Exception: The function's own, on the rank where it failed.
            CheckpointError: It has failed on another rank; the message has that one's.
        """
        if self.mesh is None:
            return [work()]
        value, problem = None, None
        try:
            if self.leads or not of_the_first:
                value = work()
        except Exception as error:
            problem = error
        found = self.everyones([value, None if problem is None else str(problem)])
        if problem is not None:
            raise problem
        for rank, (_, other) in enumerate(found):
            if other is not None:
                raise CheckpointError(f"rank {rank}: {other}")
        return [value for value, _ in found]

    @property
    def holds_a_first_copy(self) -> bool:
        """Whether this rank's shards are those of the first of several copies of the model."""
        return self.mesh is None or self.mesh.get_local_rank(REPLICATE) == 0

    def everyones(self, value: Any) -> list[Any]:
        """Returns a plain JSON value of every rank, in their order."""
        if self.mesh is None:
            return [value]
        text = self.gather(torch.frombuffer(bytearray(json.dumps(value).encode() + b"\n"), dtype=torch.uint8))
        return [json.loads(line) for line in bytes(text.tolist()).splitlines()]

    def leaders(self, value: Any) -> Any:
        """Returns the plain JSON value of rank 0; those of the others are not looked at."""
        return self.everyones(value if self.leads else None)[0]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        own = tensor.cpu()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self._group)
        return [part.to(tensor.device) for part in parts]


ALONE = Ranks()
"""One process alone."""


@contextmanager
def join_ranks(options: DistributedOptions, device: str) -> Iterator[Ranks]:
    """Context of this process among those that torchrun has started; without torchrun, of one process alone.

    Args:
        options: Options of the run on several devices.
        device: Device that the run asks for: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: This process has no GPU of its own.
    """
    rank, size = world()
    if size == 1:
        yield ALONE
        return
    own = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", rank))
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"training.device: rank {rank} needs the GPU {index} of its machine, PyTorch sees "
                f"{torch.cuda.device_count()}; start no more ranks than GPUs, or use training.device cpu"
            )
        own = torch.device("cuda", index)
        torch.cuda.set_device(own)
    store, _, _ = next(rendezvous("env://"))
    # torchrun keeps its store when it starts all ranks again, with the addresses of those that are gone
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        shard = options.shard or size
        mesh = init_device_mesh(own.type, (size // shard, shard), mesh_dim_names=(REPLICATE, SHARD))
        yield Ranks(mesh, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()
