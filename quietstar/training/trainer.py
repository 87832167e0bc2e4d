"""The training loop, one for every method: what a step computes is a function that it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from quietstar.config import TrainingOptions
from quietstar.data.batches import Batch, Batches, IndexedBatches
from quietstar.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from quietstar.training.checkpoint import (
    SavesPretrained,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer_tensors,
    load_state,
    load_weights,
    remove_old_checkpoints,
    save_checkpoint,
)
from quietstar.training.metrics import MetricsWriter, without_non_finite
from quietstar.training.optimizer import build_optimizer
from quietstar.training.output_dir import changed_options, make_output_dir
from quietstar.training.progress import Progress
from quietstar.training.schedule import learning_rate
from quietstar.training.seeds import module_seed, thought_seed

ModelT = TypeVar("ModelT", bound=nn.Module)

# Changing any other option in the middle of a run would make it a run of neither the old nor the new options.
# `steps` may change so that a run can be extended: the schedule then follows the new number from there on.
MAY_CHANGE = frozenset(
    {"steps", "micro_batch_size", "reuse_sampling_pass", "eval_every", "eval_batches", "save_every", "keep_checkpoints"}
    | {"log_every", "device", "threads", "resume"}
)


class ExtraState(Protocol):
    """Something besides the model that learns, such as a running baseline: its state is saved and restored with it."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch gives.

    Args:
        loss: Differentiable scalar: a mean over what the micro-batch is trained on.
        metrics: Scalars to report, averaged like the loss.
        weight: How much the mean counts against those of the other micro-batches of the step: the number of things that
            it is a mean over. None: the number of texts, which is right when every text has equally many of them.
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)
    weight: float | None = None


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run reports.

    Args:
        steps: Optimizer steps done, earlier parts of a resumed run included.
        train_metrics: The last `train` line of metrics.jsonl.
        eval_metrics: The last `eval` line; empty if there was none.
        best_eval: The `eval` line with the smallest `best_metric`.
        best_eval_step: Its step.
        checkpoint: The last checkpoint, a model directory.
        seconds: Wall-clock time of the run, earlier parts included.
    """

    steps: int
    train_metrics: dict[str, float]
    eval_metrics: dict[str, float]
    best_eval: dict[str, float] | None
    best_eval_step: int | None
    checkpoint: Path
    seconds: float


class Trainer(Generic[ModelT]):
    """Trains a model from where its output directory says it is.

    The order of the texts and all random numbers are pure functions of (`options.seed`, step, micro-batch), so a run
    that is stopped and resumed gives the weights of one that was not, bit for bit on a CPU.

    Args:
        model: Moved to the device of `options`.
        compute_step: `(model, batch on the device, seed) -> StepResult` for one micro-batch. The seed depends only on
            (`options.seed`, step); `batch.first` tells the micro-batches of a step apart.
        train_data: Texts int64 [n, L], which are then shuffled and cut into batches, or batches.
        options: The training options.
        output_dir: `metrics.jsonl`, `checkpoints/` and `config.yaml` go here.
        evaluate: `(model) -> metrics` on held-out text; called in evaluation mode and without gradients, every
            `eval_every` steps and at the end.
        evaluate_at_start: Evaluate before the first step too, as step 0.
        best_metric: Name of the evaluation metric whose smallest value is remembered.
        extra_state: See `ExtraState`.
        tokenizer: Saved with each checkpoint.
        config_yaml: Text for `config.yaml`.
        run_options: What else decides what is trained, plain JSON values by dotted key. Saved with each checkpoint; a
            run is resumed only with equal ones.
        progress_label: Stands in front of the progress on stderr; None prints nothing.

    Raises:
        ConfigError: The device is not there, or nothing can be trained.
        DataError: `train_data` is not int64 [n, L] with at least one text.
    """

    def __init__(
        self,
        model: ModelT,
        compute_step: Callable[[ModelT, Batch, int], StepResult],
        train_data: Tensor | Batches,
        options: TrainingOptions,
        output_dir: Path | str,
        *,
        evaluate: Callable[[ModelT], Mapping[str, float | Tensor]] | None = None,
        evaluate_at_start: bool = False,
        best_metric: str = "loss",
        extra_state: ExtraState | None = None,
        tokenizer: SavesPretrained | None = None,
        config_yaml: str | None = None,
        run_options: Mapping[str, Any] | None = None,
        progress_label: str | None = "train",
    ) -> None:
        self.device = resolve_device(options.device)
        self.model = model.to(self.device)
        self.options = options
        self.output_dir = Path(output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.optimizer = build_optimizer(model, options)
        if isinstance(train_data, Tensor):
            train_data = IndexedBatches(train_data, options.batch_size, options.seed)
        self._batches: Batches = train_data
        self._compute_step = compute_step
        self._evaluate = evaluate
        self._evaluate_at_start = evaluate_at_start
        self._best_metric = best_metric
        self._extra_state = extra_state
        self._tokenizer = tokenizer
        self._config_yaml = config_yaml
        self._run_options = None if run_options is None else dict(run_options)
        self._progress_label = progress_label
        self._record = _Record()
        self._newest: Path | None = None  # checkpoint

    def run(self) -> TrainingResult:
        """Trains up to `options.steps` and returns what was reached; a finished run returns at once.

        Raises:
            ConfigError: The output directory cannot be written to.
            NonFiniteError: A loss or gradient is NaN or infinite. The step that found it has not changed the weights.
            CheckpointError: The output directory holds checkpoints that are all damaged or of another run, or holds any
                while `options.resume` is off.
        """
        make_output_dir(self.output_dir)
        with _surroundings(self.model, self.device, self.options.threads):
            start = self._resume()
            if self._config_yaml is not None:
                (self.output_dir / "config.yaml").write_text(self._config_yaml, encoding="utf-8")
            self._started = time.monotonic() - self._record.seconds
            progress = Progress(self._progress_label, self.options.steps, start)
            try:
                with MetricsWriter(self.output_dir / "metrics.jsonl", keep_steps=start or -1) as metrics:
                    self._train(start, metrics, progress)
            finally:
                progress.close()
        record = self._record
        assert self._newest is not None  # either this run has saved, or it found itself finished
        return TrainingResult(
            steps=max(start, self.options.steps),
            train_metrics=record.last_train,
            eval_metrics=record.last_eval,
            best_eval=record.best_eval,
            best_eval_step=record.best_eval_step,
            checkpoint=self._newest,
            seconds=record.seconds,
        )

    def _train(self, start: int, metrics: MetricsWriter, progress: Progress) -> None:
        options = self.options
        if start == 0 and self._evaluate_at_start:
            self._run_evaluation(0, metrics, progress)
        window_started, window_tokens = time.monotonic(), 0
        for step in range(start + 1, options.steps + 1):
            values, tokens = self._step(step)
            self._record.add(values)
            window_tokens += tokens
            tokens_per_second = window_tokens / max(1e-9, time.monotonic() - window_started)
            progress.advance(values["loss"], tokens_per_second)
            last = step == options.steps
            if last or step % options.log_every == 0:
                line = self._record.take_means() | {
                    "learning_rate": learning_rate(step, options),
                    "tokens_per_second": tokens_per_second,
                    "seconds": time.monotonic() - self._started,
                }
                self._record.last_train = line
                metrics.write(step, "train", line)
                progress.report(line)
                window_started, window_tokens = time.monotonic(), 0
            paused = time.monotonic()
            if options.eval_every and (last or step % options.eval_every == 0):
                self._run_evaluation(step, metrics, progress)
            if last or (options.save_every and step % options.save_every == 0):
                self._save(step, metrics)
            window_started += time.monotonic() - paused  # tokens/s is the speed of training alone

    def _step(self, step: int) -> tuple[dict[str, float], int]:
        """One optimizer step; returns the step's metrics and how many text tokens it read."""
        options = self.options
        batch = self._batches.batch(step)
        texts = list(batch.names)
        size = options.micro_batch_size or len(texts)
        means = _WeightedMeans()
        tokens = 0
        for micro_index, first in enumerate(range(0, len(texts), size)):
            part = batch.part(first, size).to(self.device)
            micro_texts = list(part.names)
            tokens += part.tokens.numel()
            torch.manual_seed(module_seed(options.seed, step, micro_index))
            result = self._compute_step(self.model, part, thought_seed(options.seed, step))
            weight = float(len(micro_texts)) if result.weight is None else result.weight
            (result.loss * (weight / len(texts))).backward()
            self.optimizer.collect_gradients()
            loss = float(result.loss.detach())
            if not math.isfinite(loss):
                raise self._non_finite(step, "loss", loss, micro_texts, f"micro-batch {micro_index + 1} of the step")
            means.add({"loss": loss, **_floats(result.metrics, reserved=_STEP_KEYS)}, weight)
        if means.weight <= 0:
            raise DataError(f"step {step}: texts {texts} of the training data have nothing to train on (weight 0)")
        if means.weight != len(texts):
            self.optimizer.scale_gradients(len(texts) / means.weight)

        norms = self.optimizer.gradient_norms()
        values = means.values() | {name: float(norm) for name, norm in norms.items()}
        for name in norms:
            if not math.isfinite(values[name]):
                where = f"first in parameter {self.optimizer.first_non_finite_gradient(name)}"
                raise self._non_finite(step, name, values[name], texts, where)
        self.optimizer.clip(norms)
        self.optimizer.step(learning_rate(step, options))
        self.optimizer.zero_grad()
        return values, tokens

    def _non_finite(self, step: int, metric: str, value: float, texts: Sequence[int], where: str) -> NonFiniteError:
        self.optimizer.zero_grad()
        return NonFiniteError(
            f"step {step}: {metric} is {value} ({where}) for texts {list(texts)} of the training data; stopped before "
            f"the optimizer step. Newest checkpoint: {self._newest or 'none yet'}. "
            "Look at these texts; a lower training.learning_rate or training.max_grad_norm may help"
        )

    def _run_evaluation(self, step: int, metrics: MetricsWriter, progress: Progress) -> None:
        if self._evaluate is None:
            return
        self.model.eval()
        with torch.no_grad():
            values = _floats(self._evaluate(self.model), reserved=_EVAL_KEYS)
        self.model.train()
        record = self._record
        record.last_eval = values | {"seconds": time.monotonic() - self._started}
        metrics.write(step, "eval", record.last_eval)
        best = (record.best_eval or {}).get(self._best_metric, math.inf)
        if values.get(self._best_metric, math.nan) < best:
            record.best_eval, record.best_eval_step = record.last_eval, step
        progress.note("evaluation: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _save(self, step: int, metrics: MetricsWriter) -> None:
        self._record.seconds = time.monotonic() - self._started
        state = {
            "options": asdict(self.options),
            "run_options": self._run_options,
            "data": self._batches.fingerprint(),
            "record": self._record.state_dict(),
            "extra": None if self._extra_state is None else self._extra_state.state_dict(),
        }
        metrics.sync()
        tensors = self.optimizer.state_tensors()
        self._newest = save_checkpoint(self.checkpoints, step, self.model, tensors, state, self._tokenizer)
        remove_old_checkpoints(self.checkpoints, keep=self.options.keep_checkpoints, newest_step=step)

    def _resume(self) -> int:
        """Restores the newest whole checkpoint; returns its step, or 0 to start from the beginning."""
        if not self.options.resume:
            if found := list_checkpoints(self.checkpoints):
                raise CheckpointError(
                    f"{self.output_dir}: has checkpoints already (the newest is {found[-1][1].name}), and "
                    "training.resume is off. Choose another output_dir, or delete this one"
                )
            return 0
        path = latest_checkpoint(self.checkpoints)
        if path is None:
            return 0
        state = load_state(path)
        self._check_same_run(path, state)
        load_weights(self.model, path)
        self.optimizer.load_state_tensors(load_optimizer_tensors(path))
        self._record = _Record.from_state_dict(state["record"])
        if self._extra_state is not None and state["extra"] is not None:
            self._extra_state.load_state_dict(state["extra"])
        self._newest = path
        return int(state["step"])

    def _check_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        theirs = state.get("run_options")
        changed = changed_options(_fixed(state["options"]), _fixed(asdict(self.options)))
        if (theirs is None) != (self._run_options is None):
            changed.append("one says what its model and objective are and the other does not")
        else:
            changed += changed_options(theirs or {}, self._run_options or {})
        if state["data"] != self._batches.fingerprint():
            was, now = state["data"].get("shape"), self._batches.fingerprint().get("shape")
            changed.append(f"the training data was {was} tokens and is " + (f"{now}" if was != now else "other text"))
        if (self._extra_state is None) != (state["extra"] is None):
            changed.append("one has extra state and the other has not")
        if changed:
            raise CheckpointError(
                f"{path}: belongs to another run: {'; '.join(changed)}. Set it back, or choose another output_dir"
            )


def _fixed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {f"training.{name}": value for name, value in options.items() if name not in MAY_CHANGE}


def resolve_device(name: str) -> torch.device:
    """The device of `training.device`.

    Args:
        name: `auto` (the first GPU, or the CPU where there is none), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConfigError(f"training.device: got {name!r}, needs auto, cpu, cuda or cuda:N")
    if int(index or 0) >= count:
        raise ConfigError(f"training.device: got {name}, but PyTorch sees {count} CUDA devices here")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


_STEP_KEYS = frozenset({"step", "split", "loss", "learning_rate", "tokens_per_second", "seconds"}) | {
    "gradient_norm",
    "thought_embedding_gradient_norm",
}
_EVAL_KEYS = frozenset({"step", "split", "seconds"})


def _floats(metrics: Mapping[str, float | Tensor], reserved: frozenset[str]) -> dict[str, float]:
    if taken := sorted(metrics.keys() & reserved):
        raise ValueError(f"metric name {taken[0]!r} is the trainer's own; call it something else")
    return {name: float(value) for name, value in metrics.items()}


class _WeightedMeans:
    """Means over the micro-batches of a step."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, float], weight: float) -> None:
        self.weight += weight
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def values(self) -> dict[str, float]:
        return {name: total / self._weights[name] for name, total in self._sums.items()}


@dataclass
class _Record:
    """What the reports depend on besides the step. Saved with it, so that metrics.jsonl is exact after a resume."""

    sums: dict[str, float] = field(default_factory=dict)  # since the last logged step
    counts: dict[str, int] = field(default_factory=dict)
    last_train: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    best_eval: dict[str, float] | None = None
    best_eval_step: int | None = None
    seconds: float = 0.0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take_means(self) -> dict[str, float]:
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        state = asdict(self)
        for key in _NUMBERS:
            state[key] = None if state[key] is None else without_non_finite(state[key])
        return state

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> _Record:
        numbers = {
            key: None if state[key] is None else {k: math.nan if v is None else v for k, v in state[key].items()}
            for key in _NUMBERS
        }
        return _Record(**{**state, **numbers})


_NUMBERS = ("sums", "last_train", "last_eval", "best_eval")


@contextmanager
def _surroundings(model: nn.Module, device: torch.device, threads: int | None) -> Iterator[None]:
    """Training mode and the number of threads for the run; afterwards these and the global generators are as before."""
    was_training, threads_before = model.training, torch.get_num_threads()
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            model.train()
            yield
        finally:
            torch.set_num_threads(threads_before)
            model.train(was_training)
