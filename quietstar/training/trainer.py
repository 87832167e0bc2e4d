"""The training loop, the same for every method: a function argument computes the loss of a micro-batch.

`Trainer.run` is read first.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic

import torch
from torch import Tensor

from quietstar.config.training import TrainingOptions
from quietstar.data.batches import Batch, Batches, IndexedBatches
from quietstar.errors import CheckpointError, ConfigError, DataError, Interrupted, NonFiniteError, QuietStarError
from quietstar.model.backbone import fuse_layers, unfuse_layers
from quietstar.runs.checkpoints import STATE, differences, identity, load_state
from quietstar.runs.files import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    EventLog,
    RunLock,
    append_json,
    make_output_dir,
    write_whole,
)
from quietstar.runs.machine import Signals, StopWaiting, is_out_of_memory, resolve_device
from quietstar.training.checkpoint import SavesPretrained, load_optimizer_tensors, load_weights
from quietstar.training.loggers import Loggers, Progress
from quietstar.training.metrics import MetricsWriter, Record, TrainingResult
from quietstar.training.optimizer import MasterAdamW
from quietstar.training.ranks import ALONE, Ranks
from quietstar.training.run_checkpoints import NO_BEST, ExtraState, RunCheckpoints
from quietstar.training.schedule import learning_rate, schedule_change
from quietstar.training.step import (
    ModelT,
    OptimizerStep,
    StepResult,
    as_floats,
    in_training,
    refuse_reserved,
    thought_seed,
    write_batch,
)

_RESERVED = frozenset({"step", "split", "seconds"})
_SHOWN = frozenset({"loss", "text_nll", "base_nll", "talk_nll", "gain", "mixing_weight"})
"""Metrics that the progress shows of an evaluation with many."""


class Trainer(Generic[ModelT]):
    """Trains a model, and resumes from the newest checkpoint in the output directory.

    The order of the texts and all random numbers are pure functions of (`options.seed`, step, place in the step), so a
    run that is stopped and resumed gives the weights of a run that was not, bit for bit on a CPU.

    Args:
        model: Model to train, which is moved to the device of `options`.
        compute_step: Function `(model, batch on the device, seed) -> StepResult` for one micro-batch. The seed depends
            only on (`options.seed`, step); `batch.first` tells the micro-batches of a step apart.
        train_data: Token ids of all texts, int64 [n, L], which are shuffled and cut into batches; or batches.
        options: Options of the training loop.
        output_dir: Directory for `metrics.jsonl`, `events.jsonl`, `checkpoints/` and `config.yaml`.
        evaluate: Function `(model) -> metrics` on held-out text; called in evaluation mode and without gradients, every
            `eval_every` steps and at the end. None: no evaluation.
        evaluate_at_start: Whether to evaluate before the first step too, as step 0.
        best_metric: Name of the evaluation metric whose smallest value is remembered.
        after_evaluation: Function `(model, step)` for reports, called in evaluation mode and without gradients when the
            metrics of an evaluation are written. An error of it is shown, and training continues.
        extra_state: Object besides the model that learns; its state is saved and restored with the model.
        tokenizer: Tokenizer that is saved with each checkpoint.
        config_yaml: Text of `config.yaml`; None writes no such file.
        run_options: Other options that decide what is trained, plain JSON values by dotted key. They are saved with
            each checkpoint; a run is resumed only with equal ones, unless `options.override` is set.
        environment: Description of this process and its machine, plain JSON values that are appended to the list in
            `environment.json`; None writes none.
        make_loggers: Function `(step to start after) -> Loggers`, which receive every line of metrics, too.
        progress_label: Text before the progress on stderr; None prints no progress.
        ranks: Processes of the run. With several of them the model is sharded, each process trains on its share of a
            step's texts, and the first writes the files.

    Raises:
        ConfigError: The device does not exist, nothing can be trained, or `options.fused_layers` can't be used.
        UnsupportedBackboneError: The model has no layers that `options.fused_layers` stands for.
        ValueError: There are several ranks and an `extra_state`.
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
        after_evaluation: Callable[[ModelT, int], None] | None = None,
        extra_state: ExtraState | None = None,
        tokenizer: SavesPretrained | None = None,
        config_yaml: str | None = None,
        run_options: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        make_loggers: Callable[[int], Loggers] | None = None,
        progress_label: str | None = "train",
        ranks: Ranks = ALONE,
    ) -> None:
        self.device = resolve_device(options.device)
        self.model = model.to(self.device)
        (fuse_layers if options.fused_layers == "liger" else unfuse_layers)(self.model)
        self.options = options
        self.output_dir = Path(output_dir)
        if ranks.size > 1 and extra_state is not None:
            raise ValueError("extra_state: several ranks would each have another one; needs None")
        self._ranks = ranks
        # what the other ranks write besides checkpoints is the same, and thrown away
        self._discarded = None if ranks.leads else TemporaryDirectory(prefix="quietstar-rank-")
        self._files = self.output_dir if self._discarded is None else Path(self._discarded.name)
        self._signals = Signals(twice=ranks.size == 1)
        self._stepper = OptimizerStep(
            model, compute_step, options, self.device, self._is_interrupted, self._tell, ranks
        )
        if isinstance(train_data, Tensor):
            train_data = IndexedBatches(train_data, options.batch_size, options.seed)
        self._batches: Batches = train_data
        self._evaluate = evaluate
        self._evaluate_at_start = evaluate_at_start
        self._best_metric = best_metric
        self._after_evaluation = after_evaluation
        self._extra_state = extra_state
        self._config_yaml = config_yaml
        self._run_options = None if run_options is None else dict(run_options)
        self._environment = environment
        self._make_loggers = make_loggers if ranks.leads else None
        self._loggers: Loggers | None = None
        self._progress_label = progress_label if ranks.leads else None
        self._events = EventLog(self._files)
        self._checkpoints = RunCheckpoints(self.output_dir, model, tokenizer, options, self._events, ranks)
        self._record = Record()
        self._configured_micro_batch_size = options.micro_batch_size
        self._position: dict[str, Any] = {}
        self._extra: dict[str, Any] | None = None
        self._evaluated = (-1, math.nan)  # step and loss of the last evaluation
        self._failed_before: set[int] = set()  # steps that a roll-back has already given a second try

    @property
    def optimizer(self) -> MasterAdamW:
        """The optimizer of the model."""
        return self._stepper.optimizer

    def run(self) -> TrainingResult:
        """Trains up to `options.steps` and returns the result; a finished run returns at once.

        SIGTERM and SIGINT save a checkpoint of the last finished step and raise `Interrupted`; SIGUSR1 only saves.

        Raises:
            ConfigError: The output directory cannot be written to, or another process trains there.
            NonFiniteError: A loss, a gradient or another metric is NaN or infinite, and `options.on_non_finite` or
                `options.max_non_finite` says to stop. The step that found it has not changed the weights.
            OutOfMemoryError: The memory is not enough for one text at a time.
            CheckpointError: The output directory holds checkpoints that are all damaged or of another run, or holds any
                although `options.resume` is off; or a checkpoint cannot be written.
            Interrupted: SIGTERM or SIGINT has stopped training.
        """
        make_output_dir(self.output_dir)
        with (
            RunLock(self._files),
            in_training(self.model, self.device, self.options),
            self._signals,
        ):
            self._check_ranks()
            start = self._resume()
            self._describe()
            if start == 0:
                self._events.write(0, "started", f"{self.options.steps} steps")
            self._checkpoints.check_room()
            self._started = time.monotonic() - self._record.seconds
            self._progress = Progress(self._progress_label, self.options.steps, start)
            try:
                if self._make_loggers is not None:
                    self._loggers = self._make_loggers(start)
                with MetricsWriter(self._files / METRICS, keep_steps=start or -1) as self._metrics:
                    self._train(start)
                if start < self.options.steps:
                    self._events.write(self.options.steps, "finished", f"{self.options.steps} steps")
            except BaseException:
                with suppress(CheckpointError):  # noted in events.jsonl; the error that is being raised says more
                    self._checkpoints.wait()
                raise
            finally:
                self.options.micro_batch_size = self._configured_micro_batch_size
                self._progress.close()
                self._batches.close()
                if self._loggers is not None:
                    self._loggers.close()
                if self._discarded is not None:
                    self._discarded.cleanup()
        assert self._checkpoints.newest is not None  # this run has saved one, or was already finished
        return self._record.result(max(start, self.options.steps), self._checkpoints.newest)

    def _describe(self) -> None:
        """Writes the configuration of the run and the environment of this process."""
        try:
            if self._config_yaml is not None:
                write_whole(self._files / CONFIG, self._config_yaml)
            if self._environment is not None:
                append_json(self._files / ENVIRONMENT, self._environment)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write to {self.output_dir} ({error.strerror})") from None

    def _train(self, start: int) -> None:
        options = self.options
        if start == 0 and self._evaluate_at_start:
            self._run_evaluation(0)
        window_started, window_tokens = time.monotonic(), 0
        step = start
        self._take_position()
        while step < options.steps:
            self._stop_or_save(step)
            batch = self._next_batch(step + 1)
            if batch is None:
                continue
            try:
                values = self._stepper.run(step + 1, batch, self._restore_extra_state)
            except NonFiniteError as error:
                went_back_to = self._after_failure(step + 1, batch, error)
                if went_back_to is not None:
                    step = went_back_to
                    self._take_position()
                    continue
                values = {}
            if values is None:  # interrupted: the step will be done by the next run
                continue
            step += 1
            self._take_position()
            if values:
                self._record.failures = 0
            self._record.add(values)
            window_tokens += batch.tokens.numel() if values else 0
            tokens_per_second = window_tokens / max(1e-9, time.monotonic() - window_started)
            self._progress.advance(values.get("loss", math.nan), tokens_per_second)
            last = step == options.steps
            if last or step % options.log_every == 0:
                line = self._record.take_means() | {
                    "learning_rate": learning_rate(step, options),
                    "tokens_per_second": tokens_per_second,
                    "seconds": time.monotonic() - self._started,
                }
                if self._batches.skipped:
                    line["skipped_rows"] = float(self._batches.skipped)
                if self._batches.special:
                    line["special_tokens"] = float(self._batches.special)
                self._record.last_train = line
                self._log(step, "train", line)
                self._progress.report(line)
                window_started, window_tokens = time.monotonic(), 0
            paused = time.monotonic()
            if options.eval_every and (last or step % options.eval_every == 0):
                self._run_evaluation(step)
            if last or (options.save_every and step % options.save_every == 0):
                self._save(step, must_succeed=last)
            window_started += time.monotonic() - paused  # tokens/s counts only the time of training
        if options.steps > start:
            self._checkpoints.wait(must_succeed=True)
        self._stop_or_save(step)

    def _take_position(self) -> None:
        """Copies the state for a checkpoint of the step that is finished, before the next step can change it."""
        self._position = self._batches.state_dict()
        self._extra = None if self._extra_state is None else copy.deepcopy(self._extra_state.state_dict())

    def _is_interrupted(self) -> bool:
        """Returns whether to leave a step unfinished, which several ranks would have to agree on first."""
        return self._ranks.size == 1 and self._signals.stop is not None

    def _restore_extra_state(self) -> None:
        if self._extra_state is not None and self._extra is not None:
            self._extra_state.load_state_dict(copy.deepcopy(self._extra))

    def _next_batch(self, step: int) -> Batch | None:
        """Returns the texts of a step, or None where a signal came while waiting for them."""
        try:
            with self._signals.interrupting() if self._ranks.size == 1 else nullcontext():
                return self._batches.batch(step)
        except StopWaiting:
            return None

    def _after_failure(self, step: int, batch: Batch, error: NonFiniteError) -> int | None:
        """Applies `on_non_finite`; returns the step that training goes back to, or None to skip this one."""
        self._checkpoints.wait()
        options, record = self.options, self._record
        file = write_batch(self._files, step, batch, str(error), thought_seed(options.seed, step))
        kept = f"the batch is in {file}" if file else "the batch could not be written"
        record.failures += 1
        if options.on_non_finite == "stop" or record.failures >= options.max_non_finite:
            reason = "" if record.failures == 1 else f"{record.failures} such steps one after another; "
            self._events.write(step, "non_finite", str(error))
            raise NonFiniteError(
                f"{error}; {reason}stopped before the optimizer step; {kept}; the newest checkpoint is "
                f"{self._checkpoints.newest or 'none yet'}. A lower training.learning_rate or training.max_grad_norm "
                "may help; training.on_non_finite skip or rollback continues"
            ) from None
        if options.on_non_finite == "rollback" and step not in self._failed_before:
            self._failed_before.add(step)
            failures = record.failures
            path = self._checkpoints.newest_whole()
            if path is not None:
                back = self._load(path)
                self._record.failures = failures
                self._metrics.cut(back)
                self._progress.back_to(back)
                self._tell(step, "rollback", f"{error}; back to step {back}; {kept}")
                return back
        record.skipped += 1
        self._tell(step, "skipped", f"{error}; skipped; {kept}")
        return None

    def _tell(self, step: int, event: str, message: str) -> None:
        self._events.write(step, event, message)
        self._progress.note(message)

    # -- metrics, evaluation, checkpoints ------------------------------------------------------------------------------

    def _log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._metrics.write(step, split, values)
        if self._loggers is not None:
            self._loggers.write(step, split, values)

    def _run_evaluation(self, step: int) -> None:
        if self._evaluate is None:
            return
        self.model.eval()
        try:
            with torch.no_grad():
                values = self._measure(step, self._evaluate)
                record = self._record
                record.last_eval = values | {"seconds": time.monotonic() - self._started}
                self._log(step, "eval", record.last_eval)
                best = (record.best_eval or {}).get(self._best_metric, math.inf)
                if values.get(self._best_metric, math.nan) < best:
                    record.best_eval, record.best_eval_step = record.last_eval, step
                self._evaluated = (step, values.get(self._best_metric, math.nan))
                shown = [f"{name} {value:.4g}" for name, value in values.items() if name in _SHOWN or len(values) < 8]
                self._progress.note("evaluation: " + ", ".join(shown))
                if self._after_evaluation is not None:
                    self._report(step)
        finally:
            self.model.train()

    def _measure(self, step: int, evaluate: Callable[[ModelT], Mapping[str, float | Tensor]]) -> dict[str, float]:
        """Returns the metrics of an evaluation, whose micro-batches are made smaller where memory runs out."""
        while True:
            try:
                measured = evaluate(self.model)
                refuse_reserved(measured, _RESERVED)
                return as_floats(measured)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            self._stepper.make_room(step, self.options.batch_size, problem)

    def _report(self, step: int) -> None:
        assert self._after_evaluation is not None
        try:
            self._after_evaluation(self.model, step)
        except Exception as error:  # a failed report must not stop the training
            if self._ranks.size > 1 and not isinstance(error, OSError | QuietStarError):
                raise  # a rank that has not taken part in all exchanges is no longer in step with the others
            warnings.warn(f"the report of step {step} failed: {type(error).__name__}: {error}", stacklevel=2)
            self._events.write(step, "report_failed", f"{type(error).__name__}: {error}")

    def _stop_or_save(self, step: int) -> None:
        """Does what a signal has asked for, between two steps."""
        self._checkpoints.look()
        stop, save = self._signals.agreed(self._ranks.total)
        if stop is not None:
            if step > self._checkpoints.saved_step:
                self._save(step, must_succeed=True)
            self._checkpoints.wait(must_succeed=True)
            saved = f"step {step} is saved in {self._checkpoints.newest}" if step else "no step was finished"
            self._tell(step, "interrupted", f"{stop.name}: {saved}")
            raise Interrupted(stop, step > 0)
        if save:
            if step > self._checkpoints.saved_step:
                self._save(step)
            self._tell(step, "saved", f"SIGUSR1: saving step {step}")

    def _save(self, step: int, must_succeed: bool = False) -> None:
        self._record.seconds = time.monotonic() - self._started
        evaluated_step, loss = self._evaluated

        def state() -> dict[str, Any]:
            return {
                "run": self._identity(),
                "position": self._position,
                "record": self._record.state_dict(),
                "best": self._checkpoints.best,
                "micro_batch_size": self._stepper.micro_batch_size,
                "extra": self._extra,
            }

        self._checkpoints.save(
            step,
            loss if evaluated_step == step else math.nan,
            self.optimizer,
            state,
            self._metrics.sync,
            must_succeed,
        )

    # -- resuming ------------------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """Restores the newest whole checkpoint; returns its step, or 0 to start from the beginning."""
        path = self._checkpoints.find()
        if path is None:
            return 0
        step = self._load(path)
        self._events.write(step, "resumed", f"from {path.name}")
        return step

    def _load(self, path: Path) -> int:
        """Restores a verified checkpoint; returns its step."""
        state = load_state(path, allow_missing=self.options.allow_partial)
        if state.get("run") is not None:
            self._check_same_run(path, state)
        load_weights(self.model, path)
        rows = self.optimizer.state_rows()
        tensors = load_optimizer_tensors(path, rows, allow_missing=self.options.allow_partial)
        if tensors is None:
            self._stepper.forget_optimizer_state()
        else:
            self._load_optimizer(tensors)
        try:
            self._record = Record() if state.get("record") is None else Record.from_state_dict(state["record"])
            self._batches.load_state_dict(state.get("position") or {})
        except DataError as error:
            raise CheckpointError(f"{path / STATE}: {error}") from None
        before = (state.get("run") or {}).get("options", {})
        if before and before.get("micro_batch_size") == self._configured_micro_batch_size:
            self._stepper.use_micro_batches_of(state.get("micro_batch_size"))
        if self._extra_state is not None and state.get("extra") is not None:
            try:
                self._extra_state.load_state_dict(state["extra"])
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{path / STATE}: extra: can't be restored ({error!r})") from error
        step = int(state["step"])
        if message := schedule_change(before.get("steps"), self.options, step):
            warnings.warn(message, stacklevel=2)
        self._checkpoints.continue_from(path, step, state.get("best") or NO_BEST)
        return step

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            self.optimizer.load_state_tensors(tensors)
        except CheckpointError as error:
            if not (self.options.override and self.options.allow_partial):
                raise
            warnings.warn(f"{error}; it starts afresh", stacklevel=2)
            self._stepper.forget_optimizer_state()

    def _identity(self) -> dict[str, Any]:
        has_extra_state = self._extra_state is not None
        options = replace(self.options, micro_batch_size=self._configured_micro_batch_size)
        return identity(options, self._run_options, self._batches.fingerprint(), has_extra_state)

    def _check_ranks(self) -> None:
        first, *others = self._ranks.everyones(self._identity())
        for rank, other in enumerate(others, start=1):
            if changed := differences(first, other):
                raise ConfigError(f"rank {rank} has another run than rank 0: {'; '.join(changed)}; needs the same")

    def _check_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        changed = differences(state["run"], self._identity())
        if not changed:
            return
        if self.options.override:
            warnings.warn(f"{path}: resumed although {'; '.join(changed)}", stacklevel=2)
            self._events.write(int(state["step"]), "override", "; ".join(changed))
            return
        raise CheckpointError(
            f"{path}: belongs to another run: {'; '.join(changed)}. Set it back, or choose another output_dir; "
            "--training.override true resumes anyway"
        )
