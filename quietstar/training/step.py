"""One optimizer step: micro-batches, their gradients, and what can go wrong with them before the weights change."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from quietstar.config import TrainingOptions
from quietstar.data.batches import Batch
from quietstar.errors import DataError, NonFiniteError, OutOfMemoryError
from quietstar.training.measures import Means
from quietstar.training.optimizer import build_optimizer
from quietstar.training.out_of_memory import is_out_of_memory
from quietstar.training.record import WeightedMeans
from quietstar.training.schedule import learning_rate
from quietstar.training.seeds import module_seed, thought_seed

ModelT = TypeVar("ModelT", bound=nn.Module)

RESERVED = frozenset({"step", "split", "loss", "learning_rate", "tokens_per_second", "seconds"}) | {
    "skipped_steps",
    "skipped_rows",
    "gradient_norm",
    "thought_embedding_gradient_norm",
}
"""Metrics of a step that are the trainer's own."""


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch gives.

    Args:
        loss: Differentiable scalar: a mean over what the micro-batch is trained on.
        metrics: Scalars to report, averaged like the loss.
        means: More metrics, with the counts that they are means over.
        weight: How much the mean counts against those of the other micro-batches of the step: the number of things that
            it is a mean over. None: the number of texts, which is right when every text has equally many of them.
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)
    weight: float | None = None
    means: Means | None = None


class OptimizerStep(Generic[ModelT]):
    """Does optimizer steps, each in as many micro-batches as the memory asks for.

    Args:
        model: On its device.
        compute_step: `(model, micro-batch, seed) -> StepResult`.
        options: The training options.
        device: Of the model.
        interrupted: Whether to leave a step unfinished.
        tell: `(step, event, message)`, called when the micro-batch has become smaller.

    Attributes:
        optimizer: Of the model.
        micro_batch_size: Texts per forward and backward pass, where running out of memory has made it smaller.
    """

    def __init__(
        self,
        model: ModelT,
        compute_step: Callable[[ModelT, Batch, int], StepResult],
        options: TrainingOptions,
        device: torch.device,
        interrupted: Callable[[], bool],
        tell: Callable[[int, str, str], None],
    ) -> None:
        self.optimizer = build_optimizer(model, options)
        self.micro_batch_size: int | None = None
        self._model = model
        self._compute_step = compute_step
        self._options = options
        self._device = device
        self._interrupted = interrupted
        self._tell = tell

    def run(self, step: int, batch: Batch, undo: Callable[[], None] = lambda: None) -> dict[str, float] | None:
        """One optimizer step. Where memory runs out it is done again in smaller micro-batches, with the same gradient.

        Args:
            step: Counted from 1.
            batch: All texts of the step.
            undo: Takes back what `compute_step` has changed besides gradients; called before a step is left or begun
                again.

        Returns:
            The step's metrics, or None where it was interrupted: then nothing has changed.

        Raises:
            NonFiniteError: A metric or a gradient is NaN or infinite. The weights have not changed.
            OutOfMemoryError: Not even one text at a time fits, or `on_out_of_memory` is `stop`.
            DataError: The batch has nothing to train on.
        """
        while True:
            versions = self._versions()
            try:
                values = self._try(step, batch)
                if values is None:
                    undo()
                return values
            except NonFiniteError:
                undo()
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            undo()
            # outside the handler, whose traceback keeps the tensors that have to go
            self.make_room(step, len(batch), problem, weights_changed=self._versions() != versions)

    def use_micro_batches_of(self, size: int | None) -> None:
        """Takes so many texts at a time from here on; evaluations, which read the options, too. None: no change."""
        if size is not None:
            self._options.micro_batch_size = self.micro_batch_size = size

    def forget_optimizer_state(self) -> None:
        """Starts the optimizer afresh from the weights as they are."""
        self.optimizer = build_optimizer(self._model, self._options)

    def _try(self, step: int, batch: Batch) -> dict[str, float] | None:
        options = self._options
        means = WeightedMeans()
        measured: Means | None = None
        size = self._size(len(batch))
        for micro_index, first in enumerate(range(0, len(batch), size)):
            part = batch.part(first, size).to(self._device)
            torch.manual_seed(module_seed(options.seed, step, micro_index))
            result = self._compute_step(self._model, part, thought_seed(options.seed, step))
            weight = float(len(part)) if result.weight is None else result.weight
            refuse_reserved(result.metrics, RESERVED)
            if result.means is not None:
                measured = result.means if measured is None else measured + result.means
            (result.loss * (weight / len(batch))).backward()
            self.optimizer.collect_gradients()
            values = as_floats({"loss": result.loss, **result.metrics})
            found = values if result.means is None else values | result.means.floats()
            for name, value in found.items():
                if not math.isfinite(value):
                    raise self._non_finite(step, name, value, part, f"micro-batch {micro_index + 1} of the step")
            means.add(values, weight)
            if first + len(part) < len(batch) and self._interrupted():
                self.optimizer.zero_grad()
                return None
        if means.weight <= 0:
            raise DataError(f"step {step}: {some_names(batch)}: nothing to train on (weight 0)")
        if means.weight != len(batch):
            self.optimizer.scale_gradients(len(batch) / means.weight)
        norms = self.optimizer.gradient_norms()
        values = means.values() if measured is None else means.values() | measured.floats()
        values |= {name: float(norm) for name, norm in norms.items()}
        for name in norms:
            if not math.isfinite(values[name]):
                culprit = self.optimizer.first_non_finite_gradient(name)
                where = f"first in parameter {culprit}" if culprit else "every gradient is finite, their norm overflows"
                raise self._non_finite(step, name, values[name], batch, where)
        self.optimizer.clip(norms)
        self.optimizer.step(learning_rate(step, options))
        self.optimizer.zero_grad()
        return values

    def _size(self, texts: int) -> int:
        return min(self._options.micro_batch_size or texts, texts)

    def _versions(self) -> list[int]:
        """Count the writes to each parameter."""
        return [parameter._version for parameter in self._model.parameters()]

    def _non_finite(self, step: int, metric: str, value: float, batch: Batch, where: str) -> NonFiniteError:
        self.optimizer.zero_grad()
        return NonFiniteError(f"step {step}: {metric} is {value} ({where}) for {some_names(batch)}")

    def make_room(self, step: int, texts: int, problem: str, weights_changed: bool = False) -> None:
        """Halves the micro-batch, where that can help.

        Args:
            step: That ran out of memory.
            texts: In a batch.
            problem: What was said about it.
            weights_changed: It was too late.

        Raises:
            OutOfMemoryError: It cannot help.
        """
        self.optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        size = self._size(texts)
        short = problem.split("\n")[0][:300]
        found = f"out of memory at step {step} with {size} text(s) at a time ({short})"
        if weights_changed:
            raise OutOfMemoryError(f"{found}, while the weights were changing: start again, to resume")
        if self._options.on_out_of_memory == "stop" or size == 1:
            raise OutOfMemoryError(
                f"{found}. Lower training.micro_batch_size, data.length or model.thoughts_per_position, or think at "
                "fewer model.positions; python -m quietstar.plan with the same arguments says what fits"
            )
        self.use_micro_batches_of(size // 2)
        message = f"{found}: {size // 2} at a time from here on; the batch stays {texts}"
        self._tell(step, "out_of_memory", message)


def refuse_reserved(names: Collection[str], reserved: Collection[str]) -> None:
    """Checks the names of metrics.

    Raises:
        ValueError: One is the trainer's own.
    """
    if taken := sorted(set(names) & set(reserved)):
        raise ValueError(f"metric name {taken[0]!r} is the trainer's own; call it something else")


def as_floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The metrics as numbers."""
    tensors = {name: value.detach().double() for name, value in metrics.items() if isinstance(value, Tensor)}
    # all at once: on a GPU each number that is fetched by itself waits for everything queued before it
    device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), torch.device("cpu"))
    together = [tensor.to(device).reshape(()) for tensor in tensors.values()]
    values = dict(zip(tensors, torch.stack(together).tolist(), strict=True)) if tensors else {}
    return {name: values[name] if name in values else float(value) for name, value in metrics.items()}


def some_names(batch: Batch) -> str:
    """The names of a batch's texts, the first few of many."""
    names = list(batch.names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
