"""One optimizer step: micro-batches, their gradients, and what can go wrong with them before the weights change.

`OptimizerStep.run` is read first. `Means` are the measurements of a step: sums in float64 that are added up on the
device, so that any cut into micro-batches gives the same. The seeds are pure functions of the step, so that a run's
position is one integer and no generator state is saved. `write_batch` keeps the batch of a step that gave NaN or
infinity.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quietstar.config.training import TrainingOptions
from quietstar.data.batches import Batch
from quietstar.errors import DataError, NonFiniteError, OutOfMemoryError
from quietstar.model.sharding import call
from quietstar.objective.learning import LearnOutput
from quietstar.runs.files import saving, write_json
from quietstar.runs.machine import is_out_of_memory
from quietstar.training.metrics import WeightedMeans
from quietstar.training.optimizer import build_optimizer
from quietstar.training.ranks import ALONE, Ranks
from quietstar.training.schedule import learning_rate

ModelT = TypeVar("ModelT", bound=nn.Module)

RESERVED = frozenset({"step", "split", "loss", "learning_rate", "tokens_per_second", "seconds"}) | {
    "skipped_steps",
    "skipped_rows",
    "special_tokens",
    "gradient_norm",
    "thought_embedding_gradient_norm",
}
"""Names of metrics that the trainer itself writes, so that a step's own metrics cannot have them."""

DECILES = 10
DIRECTORY = "non_finite"
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class StepResult:
    """The result of one micro-batch.

    Args:
        loss: Mean loss over the targets of the micro-batch, a differentiable scalar.
        metrics: Scalars to report, averaged like the loss.
        means: More metrics, with the counts that they are means over.
        weight: Weight of the loss among the micro-batches of the step: the number of terms of the mean. None: the
            number of texts, which is right when every text has equally many terms.
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)
    weight: float | None = None
    means: Means | None = None


@dataclass(frozen=True)
class _Problem:
    """A metric that is NaN or infinite, where it was found, and the names of the texts."""

    metric: str
    value: float
    where: str
    texts: str


class OptimizerStep(Generic[ModelT]):
    """Does optimizer steps, each in micro-batches that fit into the memory.

    Args:
        model: Model to train, on its device.
        compute_step: Function `(model, micro-batch, seed) -> StepResult`.
        options: Options of the training loop.
        device: Device of the model.
        interrupted: Function that returns whether to leave a step unfinished.
        tell: Function `(step, event, message)`, called when the micro-batch has become smaller.
        ranks: Processes of the run; each does its share of the texts of a step.

    Attributes:
        optimizer: Optimizer of the model.
        micro_batch_size: Number of texts per forward and backward pass, where running out of memory has made it
            smaller than the option says; else None.
    """

    def __init__(
        self,
        model: ModelT,
        compute_step: Callable[[ModelT, Batch, int], StepResult],
        options: TrainingOptions,
        device: torch.device,
        interrupted: Callable[[], bool],
        tell: Callable[[int, str, str], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.optimizer = build_optimizer(model, options, ranks)
        self._ranks = ranks
        self.micro_batch_size: int | None = None
        self._model = model
        self._compute_step = compute_step
        self._options = options
        self._device = device
        self._interrupted = interrupted
        self._tell = tell

    def run(self, step: int, batch: Batch, undo: Callable[[], None] = lambda: None) -> dict[str, float] | None:
        """Does one optimizer step. Where memory runs out, it repeats the step in smaller micro-batches.

        The gradient is the same for any size of the micro-batches.

        Args:
            step: Number of the optimizer step, counted from 1.
            batch: All texts of the step.
            undo: Function that takes back what `compute_step` has changed besides gradients; called before a step is
                left unfinished or repeated.

        Returns:
            The metrics of the step, or None where it was interrupted: then nothing has changed.

        Raises:
            NonFiniteError: A metric or a gradient is NaN or infinite. The weights have not changed.
            OutOfMemoryError: The memory is not enough for one text at a time, or `on_out_of_memory` is `stop`.
            DataError: The batch has nothing to train on.
        """
        if len(batch) % self._ranks.size:
            raise DataError(f"step {step}: {len(batch)} texts do not divide among {self._ranks.size} ranks")
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
            # outside the handler, because the traceback keeps the tensors that have to be freed
            self.make_room(step, len(batch), problem, weights_changed=self._versions() != versions)

    def use_micro_batches_of(self, size: int | None) -> None:
        """Uses micro-batches of this size from now on, in evaluations too, which read the options; None: no change."""
        if size is not None:
            self._options.micro_batch_size = self.micro_batch_size = size

    def forget_optimizer_state(self) -> None:
        """Starts the optimizer again, without state, from the present weights."""
        self.optimizer = build_optimizer(self._model, self._options, self._ranks)

    def _try(self, step: int, batch: Batch) -> dict[str, float] | None:
        options = self._options
        means = WeightedMeans()
        measured: Means | None = None
        problem: _Problem | None = None
        share = self._ranks.share(len(batch))
        size = self._size(len(batch))
        for micro_index, first in enumerate(range(share.start, share.stop, size)):
            part = batch.part(first, min(size, share.stop - first)).to(self._device)
            torch.manual_seed(module_seed(options.seed, step, micro_index))
            result = call(self._model, self._compute_step, part, thought_seed(options.seed, step))
            weight = float(len(part)) if result.weight is None else result.weight
            refuse_reserved(result.metrics, RESERVED)
            if result.means is not None:
                measured = result.means if measured is None else measured + result.means
            self.optimizer.backward(result.loss * (weight / len(batch)))
            values = as_floats({"loss": result.loss, **result.metrics})
            found = values if result.means is None else values | result.means.floats()
            for name, value in found.items():
                if not math.isfinite(value):
                    where = f"micro-batch {micro_index + 1} of the step"
                    problem = problem or _Problem(name, value, where, some_names(part))
            if problem and self._ranks.size == 1:  # others would wait for this one
                break
            means.add(values, weight)
            if first + len(part) < share.stop and self._interrupted():
                self.optimizer.zero_grad()
                return None
        self._raise_any(step, problem)
        means, measured = means.over(self._ranks.total), None if measured is None else measured.over(self._ranks.total)
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
                culprit = next(filter(None, self._ranks.everyones(culprit)), None)
                where = f"first in parameter {culprit}" if culprit else "every gradient is finite, their norm overflows"
                raise self._non_finite(step, _Problem(name, values[name], where, some_names(batch)))
        self.optimizer.clip(norms)
        self.optimizer.step(learning_rate(step, options))
        self.optimizer.zero_grad()
        return values

    def _size(self, texts: int) -> int:
        own = len(self._ranks.share(texts))
        return min(self._options.micro_batch_size or own, own)

    def _versions(self) -> list[int]:
        """Returns the number of writes to each parameter so far."""
        return [parameter._version for parameter in self._model.parameters()]

    def _raise_any(self, step: int, problem: _Problem | None) -> None:
        """Raises the first problem of any rank, on all of them.

        Raises:
            NonFiniteError: A rank has a problem.
        """
        if self._ranks.total(torch.tensor(float(problem is not None))) > 0:
            found = next(filter(None, self._ranks.everyones(None if problem is None else asdict(problem))))
            raise self._non_finite(step, _Problem(**found))

    def _non_finite(self, step: int, problem: _Problem) -> NonFiniteError:
        self.optimizer.zero_grad()
        return NonFiniteError(f"step {step}: {problem.metric} is {problem.value} ({problem.where}) for {problem.texts}")

    def make_room(self, step: int, texts: int, problem: str, weights_changed: bool = False) -> None:
        """Halves the micro-batch, where that can help.

        Args:
            step: Number of the step that ran out of memory.
            texts: Number of texts in a batch.
            problem: Message of the error.
            weights_changed: Whether the weights were already changing, so that the step cannot be repeated.

        Raises:
            OutOfMemoryError: A smaller micro-batch cannot help, or `on_out_of_memory` is `stop`.
        """
        self.optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        size = self._size(texts)
        short = problem.split("\n")[0][:300]
        found = f"out of memory at step {step} with {size} text(s) at a time ({short})"
        if self._ranks.size > 1:  # the others are in the middle of an exchange
            advice = "ranks do not halve their micro-batch; lower training.micro_batch_size and start again to resume"
            raise OutOfMemoryError(f"{found} on rank {self._ranks.rank}; {advice}")
        if weights_changed:
            raise OutOfMemoryError(f"{found}, while the weights were changing; start again to resume")
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
        ValueError: A name is one that the trainer writes itself.
    """
    if taken := sorted(set(names) & set(reserved)):
        raise ValueError(f"metric name {taken[0]!r} is used by the trainer; choose another name")


def as_floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Returns the metrics as numbers."""
    tensors = {name: value.detach().double() for name, value in metrics.items() if isinstance(value, Tensor)}
    # all at once: on a GPU each number that is fetched alone waits for everything queued before it
    device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), torch.device("cpu"))
    together = [tensor.to(device).reshape(()) for tensor in tensors.values()]
    values = dict(zip(tensors, torch.stack(together).tolist(), strict=True)) if tensors else {}
    return {name: values[name] if name in values else float(value) for name, value in metrics.items()}


def some_names(batch: Batch) -> str:
    """Returns the names of the first few texts of a batch, for a message."""
    names = list(batch.names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@dataclass(frozen=True)
class Means:
    """Several means by name, as sums that can be added up.

    Args:
        names: Names of the M means.
        totals: Sum of each mean's terms, float64 [M].
        counts: Number of each mean's terms, float64 [M].
    """

    names: tuple[str, ...]
    totals: Tensor
    counts: Tensor

    def __add__(self, other: Means) -> Means:
        return Means(self.names, self.totals + other.totals, self.counts + other.counts)

    def over(self, total: Callable[[Tensor], Tensor]) -> Means:
        """Returns the means over what several ranks have measured, given the function that sums over them."""
        totals, counts = total(torch.stack([self.totals, self.counts])).unbind()
        return Means(self.names, totals, counts)

    def nothing(self) -> Means:
        """Returns the same means over no terms."""
        return Means(self.names, torch.zeros_like(self.totals), torch.zeros_like(self.counts))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the means as float64 scalars on the device; 0 where there are no terms."""
        return dict(zip(self.names, (self.totals / self.counts.clamp_min(1)).unbind(), strict=True))

    def floats(self) -> dict[str, float]:
        """Returns the means as numbers, fetched from the device together."""
        means: list[float] = (self.totals / self.counts.clamp_min(1)).tolist()
        return dict(zip(self.names, means, strict=True))


def text_targets(batch: Batch) -> Tensor:
    """Returns where the next token belongs to the same document and is to be learned, bool [B, L-1]."""
    mask = batch.attention_mask
    if mask is None:
        targets = torch.ones_like(batch.tokens[:, 1:], dtype=torch.bool)
    else:
        targets = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
    return targets if batch.loss_mask is None else targets & batch.loss_mask[:, 1:]


def step_means(output: LearnOutput, batch: Batch) -> Means:
    """Measures the thoughts of a batch; NLLs and gains are in nats.

    Args:
        output: Output of `learn` for the batch.
        batch: Texts of the batch.

    Returns:
        Means over the text: `text_nll`, the NLL of the whole text without thought. Over the targets of thoughts:
        `base_nll` without and `talk_nll` with thought, their difference `gain`, the three again by lookahead
        (`base_nll_0`, ...), `mixing_weight` and its square `mixing_weight_square` (the standard deviation is the root
        of `mixing_weight_square - mixing_weight**2`). Over thoughts: `reward`, its absolute value `reward_size`, the
        absolute value of the advantage `advantage_size`; and per token `thought_logprob` at the policy temperature, and
        `thought_entropy`, the negative log-probability at the sampling temperature: an unbiased estimate of the entropy
        of the distribution that thoughts are sampled from.
    """
    mask = output.target_mask
    thinking = mask.any(-1)
    per_target = torch.stack([output.base_nll_at_target, output.talk_nll, output.mixing_weight]).double()
    per_target = per_target.masked_fill(~mask, 0)
    base, talk, weight = per_target.sum((1, 2))  # [J]
    square = per_target[2].square().sum()
    per_thought = torch.stack(
        [
            output.reward,
            output.reward.abs(),
            output.advantage.abs(),
            output.thought_logprob.mean(-1),
            0 - output.thoughts.logprob.mean(-1),
        ]
    )
    per_thought = per_thought.double().masked_fill(~thinking, 0).sum((1, 2))  # [5]
    text = output.base_nll.double().sum()
    base_total, talk_total, weight_total = torch.stack([base, talk, weight]).sum(1).unbind()
    single = torch.stack([text, base_total, talk_total, base_total - talk_total, weight_total, square])

    lookahead = range(mask.shape[-1])
    targets = mask.sum((0, 1))  # [J]
    target_count = targets.sum().expand(5)
    thought_count = thinking.sum().expand(len(per_thought))
    text_count = text_targets(batch).sum()[None]
    return Means(
        (
            *("text_nll", "base_nll", "talk_nll", "gain", "mixing_weight", "mixing_weight_square"),
            *("reward", "reward_size", "advantage_size", "thought_logprob", "thought_entropy"),
            *(f"{name}_{j}" for name in ("base_nll", "talk_nll", "gain") for j in lookahead),
        ),
        torch.cat([single, per_thought, base, talk, base - talk]),
        torch.cat([text_count, target_count, thought_count, targets, targets, targets]).double(),
    )


def gain_by_difficulty(base_nll: Tensor, talk_nll: Tensor) -> dict[str, float]:
    """Measures what thoughts gain on easy and on hard tokens.

    Args:
        base_nll: NLL of each target without thought, in nats, [N].
        talk_nll: NLL of each target after the thought, in nats, [N].

    Returns:
        `gain_decile_0`, the mean gain on the tenth of the targets with the smallest NLL without thought, to
        `gain_decile_9`; tenths without a target are left out.
    """
    order = base_nll.argsort(stable=True)
    gain = (base_nll.double() - talk_nll.double())[order]
    edges = [len(gain) * edge // DECILES for edge in range(DECILES + 1)]
    tenths = [gain[first:end] for first, end in pairwise(edges)]
    return {f"gain_decile_{index}": float(tenth.mean()) for index, tenth in enumerate(tenths) if len(tenth)}


def thought_seed(seed: int, step: int) -> int:
    """Returns the seed of the thoughts of one optimizer step.

    The numbers are folded one after another through the SplitMix64 finalizer, so neighbouring steps and seeds get
    unrelated values, and the thoughts of a step do not depend on what ran before it. All micro-batches of a step share
    the seed: a text's thoughts do not depend on how the step is cut up.

    Args:
        seed: Seed of the run, any integer; it is taken modulo 2**64.
        step: Number of the optimizer step, counted from 1.

    Returns:
        A seed in 0 .. 2**63 - 1.
    """
    return _fold(seed, step, 0, 0)


def module_seed(seed: int, step: int, micro_index: int) -> int:
    """Returns the seed of the global generator (dropout) in one micro-batch; it is not correlated with `thought_seed`.

    Args:
        seed: Seed of the run, any integer; it is taken modulo 2**64.
        step: Number of the optimizer step, counted from 1.
        micro_index: Number of the micro-batch in the step, counted from 0.

    Returns:
        A seed in 0 .. 2**63 - 1.
    """
    return _fold(seed, step, micro_index, 1)


def _fold(*values: int) -> int:
    state = 0
    for value in values:
        state = _split_mix_64(state ^ (value & _MASK))
    return state >> 1


def _split_mix_64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def write_batch(run_directory: Path, step: int, batch: Batch, problem: str, seed: int) -> Path | None:
    """Writes `non_finite/step-00000007.json`, and the tokens in a `.safetensors` file of the same name.

    Args:
        run_directory: Directory of the run.
        step: Number of the optimizer step, counted from 1.
        batch: All texts of the step.
        problem: Description of what was NaN or infinite.
        seed: Seed of the thoughts of the step.

    Returns:
        The path of the JSON file, or None where it cannot be written, because the problem matters more than the file.
    """
    file = run_directory / DIRECTORY / f"step-{step:08d}.json"
    tensors = {"tokens": batch.tokens.cpu().contiguous()}
    if batch.attention_mask is not None:
        tensors["attention_mask"] = batch.attention_mask.cpu().contiguous()
    try:
        file.parent.mkdir(exist_ok=True)
        with saving(file.parent):
            save_file(tensors, file.with_suffix(".safetensors"))
        write_json(file, {"step": step, "problem": problem, "texts": list(batch.names), "thought_seed": seed})
    except OSError:
        return None
    return file


@contextmanager
def in_training(model: nn.Module, device: torch.device, options: TrainingOptions) -> Iterator[None]:
    """Sets training mode, threads and determinism for the run; on exit these and the global generators are restored."""
    was_training, threads_before = model.training, torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        try:
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            if options.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS has no fixed order
                torch.use_deterministic_algorithms(True)
            model.train()
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.use_deterministic_algorithms(was_deterministic)
            model.train(was_training)
