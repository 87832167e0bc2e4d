"""STaR (arXiv 2203.14465, Algorithm 1): samples rationales, keeps the right ones, rationalises failures, and
fine-tunes.

Every iteration starts from the base model again. The generators of V-STaR, RFT and ReST-EM are the same loop with other
options. `OuterLoop.run` is read first; `check_problems` at the end asks whether all prompts and completions fit, before
anything is sampled.
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.config.loops import OuterLoopConfig, fine_tuning_steps
from quietstar.config.sampling import SamplingOptions
from quietstar.config.training import FinetuningOptions
from quietstar.data.examples import encode_example, end_of_sequence
from quietstar.data.tokenizer import encode_prompt, load_tokenizer, tokenizer_fingerprint
from quietstar.errors import CheckpointError, ConfigError, DataError, QuietStarError
from quietstar.model.loading import load_causal_lm, load_configuration, weights_sha256
from quietstar.outer_loop.finetune import (
    MODEL,
    RUN,
    fine_tune,
    forget_checkpoints,
    forget_other_run,
    free_memory,
)
from quietstar.outer_loop.phases import Phases, key_of
from quietstar.outer_loop.sampled import Completions, Generator, verdict_of
from quietstar.outer_loop.store import Sample, SampleStore
from quietstar.outer_loop.training_set import (
    Kept,
    demonstrations,
    describe,
    read_kept,
    right_completions,
    without_duplicates,
    write_kept,
)
from quietstar.runs.checkpoints import MAY_CHANGE
from quietstar.runs.files import KEPT, SERVER_LOG, STORE
from quietstar.sampling.choice import chosen_engine, make_sampler, start_server
from quietstar.sampling.requests import Request, Sampler, check_lengths, sample_seed
from quietstar.sampling.vllm_server import VllmServer
from quietstar.tasks.task import Problem, Task

SCHEDULE = (
    *("schedule", "start_steps", "growth", "added_steps", "start_epochs", "added_epochs", "supervised_epochs"),
    "supervised_steps",
    "few_shot_in_training",
)
"""Fields of `LoopOptions` that a phase of fine-tuning depends on."""

FILTERS = ("demonstrations", "deduplicate", "max_per_problem", "drop_hint_quotes", "accumulate")
"""Fields of `LoopOptions` that the choice of training examples depends on."""

LONGEST = 64
"""Number of prompts with the most characters that are encoded: one of them has the most tokens, or nearly so. Prompts
are checked again, exactly, when they are sampled."""


@dataclass(frozen=True)
class RunContext:
    """Everything that a loop works with.

    Args:
        config: Configuration with all options of the run.
        task: Task that the model learns.
        out: Directory of the run.
        base: Directory or hub name of the base model.
        store: Store of all samples of the run.
        phases: Phases of the run.
        tell: Function called with each line of progress.
    """

    config: OuterLoopConfig
    task: Task
    out: Path
    base: str
    store: SampleStore
    phases: Phases
    tell: Callable[[str], None]


class OuterLoop:
    """The iterations of a run. Each phase is done once; a run that is started again continues after the finished ones.

    Args:
        around: Configuration, task, store and phases of the run.
    """

    def __init__(self, around: RunContext) -> None:
        # samples of another engine are other samples, so the chosen one is among the options of sampling
        engine = chosen_engine(around.config.sampling, around.config.training.device)
        sampling = replace(around.config.sampling, engine=engine)
        self.config, self.task, self.out = replace(around.config, sampling=sampling), around.task, around.out
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(around.base)
        end_of_sequence(self.tokenizer)
        self.seed = self.config.training.seed
        self.phases = around.phases
        self.train_problems = list(self.task.problems("train"))
        self.test_problems = chosen_problems(
            self.task.problems("test"), self.config.problems.test_limit, self.config.problems.seed
        )
        self._base = around.base
        self._store = around.store
        self.tell = around.tell
        self._served: Generator | None = None
        self._server: VllmServer | None = None
        self._checked: set[tuple[Generator, tuple[tuple[str, int, int, int], ...]]] = set()
        self.completions = Completions(
            self.task,
            around.store,
            self.phases,
            self.seed,
            self.config.problems.timeout,
            self._sampler,
            around.tell,
        )

    def run(self, after_iteration: Callable[[], None] = lambda: None) -> list[Generator]:
        """Does the unfinished part of all iterations.

        Args:
            after_iteration: Function called before the first iteration and after each.

        Returns:
            The generators: the model that the first iteration samples from, and the one that each iteration ends with.

        Raises:
            DataError: An iteration has nothing to train on, or a problem does not fit into the model's context.
            ConfigError: A completion may not fit into a row.
            CheckpointError: A phase was done with other options, or something is damaged.
        """
        base = self.base()
        context = getattr(load_configuration(base.path).get_text_config(), "max_position_embeddings", None)
        check_problems(self.config, self.task, self.tokenizer, context, self.train_problems, self.test_problems)
        generators = [self._supervised(base) if self.config.loop.supervised_start else base]
        self._evaluate(0, generators[0])
        for iteration in range(1, self.config.loop.iterations + 1):
            after_iteration()
            generators.append(self._iteration(iteration, base, generators[-1]))
        after_iteration()
        return generators

    def base(self) -> Generator:
        """Returns the model that fine-tuning starts from.

        Raises:
            CheckpointError: The model has other weights than when the run began.
        """
        inputs = {
            "dtype": self.config.model.dtype,
            "tokenizer": tokenizer_fingerprint(self.tokenizer)["sha256"],
            "model_sha256": weights_sha256(load_causal_lm(self._base, self._dtype())),
        }
        made = self.phases.run(0, "base", inputs, lambda _: {"model_sha256": inputs["model_sha256"]})
        found = Generator(self._base, made["model_sha256"])
        self._checked.add((found, _state_of(found.path)))
        return found

    def check_weights(self, generator: Generator) -> None:
        """Compares a generator's weights with those that the run has recorded, once as long as its files stay the same.

        Raises:
            CheckpointError: The weights are other ones, or cannot be read; the message says how to get them back.
        """
        state = (generator, _state_of(generator.path))
        if state in self._checked:
            return
        directory = Path(generator.path).parent
        advice = "put back what was there"
        if (directory / "train.json").is_file():
            advice += f", or delete {directory / 'train.json'} to have {directory.name} trained again"
        try:
            found = weights_sha256(load_causal_lm(generator.path, self._dtype()))
        except QuietStarError as error:
            raise CheckpointError(f"{error}; {advice}") from error
        free_memory()
        if found != generator.sha256:
            raise CheckpointError(
                f"{generator.path}: its weights are not those that the run recorded (sha256 {found[:12]}, not "
                f"{generator.sha256[:12]}); {advice}"
            )
        self._checked.add(state)

    def fine_tune(
        self,
        iteration: int,
        name: str,
        start: Generator,
        kept: Sequence[Kept],
        steps: Callable[[int], int],
        learning_rate: float | None = None,
    ) -> Generator:
        """Does a phase that trains on examples, and returns the model that it made.

        Args:
            iteration: Number of the iteration that the phase belongs to.
            name: Name of the phase.
            start: Generator with the weights that training starts from.
            kept: Examples to train on.
            steps: Function from the number of rows to the number of optimizer steps.
            learning_rate: Learning rate in place of `training.learning_rate`; None for that one.
        """
        config, directory = self.config, self.phases.directory_of(iteration)
        before = self.task.few_shot() if config.loop.few_shot_in_training and config.sampling.few_shot else ""
        training = replace(
            config.training,
            seed=sample_seed(self.seed, iteration, name) % 2**31,
            learning_rate=learning_rate or config.training.learning_rate,
        )
        fixed = {key: value for key, value in asdict(training).items() if key not in MAY_CHANGE}
        inputs = {
            "base_sha256": start.sha256,
            "examples": key_of({"kept": [asdict(one) for one in kept], "few_shot": before}),
            "loop.row_length": config.loop.row_length,
            **{f"loop.{key}": getattr(config.loop, key) for key in SCHEDULE},
            **{f"training.{key}": value for key, value in fixed.items()},
            **finetuning_inputs(config.finetuning),
        }

        def train(key: str) -> dict[str, Any]:
            self.end_server()
            examples = [
                encode_example(self.tokenizer, before + one.prompt, one.completion, f"problem {one.problem or '-'}")
                for one in kept
            ]
            longest = max(examples, key=len)
            if len(longest) > config.loop.row_length:
                raise DataError(
                    f"loop.row_length: got {config.loop.row_length}, but {longest.name} has {len(longest)} tokens with "
                    "its completion; raise it"
                )
            forget_other_run(directory / RUN, key)
            return fine_tune(
                start.path,
                start.sha256,
                self.tokenizer,
                examples,
                config.loop.row_length,
                steps,
                config.model,
                config.finetuning,
                training,
                directory,
                f"iteration {iteration}: {name}",
            )

        outputs = self.phases.run(iteration, name, inputs, train)
        forget_checkpoints(directory)
        free_memory()
        return Generator(str(directory / MODEL), outputs["model_sha256"])

    def end_server(self) -> None:
        """Ends the server that this run samples with, if there is one, so that the device is free for other work."""
        if self._server is not None:
            self._server.close()
            self._server = self._served = None

    def samples(self, iteration: int, purpose: str) -> list[Sample]:
        """Returns the samples of a finished phase, with verdicts."""
        made = self.phases.outputs(iteration, purpose)
        return [] if made is None else list(self._store.samples(made["key"]).values())

    def verifier_sha256(self, kind: str) -> str:
        """Returns the hash of a verifier that has been trained."""
        made = self.phases.outputs(self.config.loop.iterations, f"verifier_{kind}")
        assert made is not None
        return str(made["sha256"])

    def _supervised(self, base: Generator) -> Generator:
        """Returns G_SFT of V-STaR: the base fine-tuned on the human-written solutions."""
        solved = demonstrations(self.task)
        if not solved:
            raise DataError(
                f"loop.supervised_start: task {self.task.name} has no human-written solutions to begin with; turn it "
                "off, and the first iteration samples from the base with solved examples before its prompts"
            )
        options, batch = self.config.loop, self.config.training.batch_size

        def steps(rows: int) -> int:
            return options.supervised_steps or max(1, math.ceil(rows * options.supervised_epochs / batch))

        rate = options.supervised_learning_rate or self.config.training.learning_rate
        return self.fine_tune(0, "train", base, solved, steps, rate)

    def _iteration(self, iteration: int, base: Generator, generator: Generator) -> Generator:
        options = self.config.loop
        kept = self._kept(iteration, generator)
        human = demonstrations(self.task) if options.demonstrations else []
        tuned = self.fine_tune(
            iteration,
            "train",
            base if options.start_from == "base" else generator,
            human + kept,
            lambda rows: fine_tuning_steps(iteration, options, rows, self.config.training.batch_size),
        )
        self._evaluate(iteration, tuned)
        if options.keep_models == "last" and iteration > 1:  # a verifier is compared with the first model
            shutil.rmtree(self.phases.directory_of(iteration - 1) / MODEL, ignore_errors=True)
        return tuned

    def _kept(self, iteration: int, generator: Generator) -> list[Kept]:
        """Samples, rationalises and filters, and returns the examples of an iteration without demonstrations."""
        options, sampling = self.config.loop, self.config.sampling
        problems = chosen_problems(
            self.train_problems, self.config.problems.limit, sample_seed(self.config.problems.seed, iteration)
        )
        samples, summary = self.completions.of(iteration, "sample", generator, problems, sampling)
        made = {"sample": summary["sha256"]}
        if options.rationalize:
            solved = {one.place.problem for one in samples if verdict_of(one).correct}
            failed = [problem for problem in problems if problem.id not in solved]
            count = round(len(failed) * options.rationalization_fraction)
            retried = chosen_problems(failed, count, sample_seed(self.seed, iteration, "retried")) if count else []
            if retried:
                more, summary = self.completions.of(iteration, "rationalize", generator, retried, sampling)
                made["rationalize"] = summary["sha256"]
                samples = samples + more
        accumulated = options.accumulate == "all" and iteration > 1
        if accumulated:
            made["before"] = self._built(iteration - 1)["sha256"]
        file = self.phases.directory_of(iteration) / KEPT

        def build(_: str) -> dict[str, Any]:
            before = read_kept(self.phases.directory_of(iteration - 1) / KEPT) if accumulated else []
            by_id = {problem.id: problem for problem in problems}
            new, counts = right_completions(self.task, by_id, samples, options)
            if not new:
                raise DataError(
                    f"iteration {iteration}: none of {len(samples)} completions has the right answer, so there is "
                    "nothing to learn from. Take easier problems, more sampling.samples at a temperature above 0, a "
                    "longer sampling.max_new_tokens, or solved examples (problems.few_shot_path); "
                    f"{self.out / STORE} shows what the model wrote"
                )
            human = demonstrations(self.task) if options.demonstrations else []
            everything = without_duplicates(self.task, human + before + new, options, self.seed)
            kept = everything[len(human) :]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_kept(file, kept)
            return {
                "new": len(new),
                **counts,
                **describe(kept),
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }

        rules = {f"loop.{name}": getattr(options, name) for name in FILTERS}
        built = self.phases.run(iteration, "build", {**made, **rules, "training.seed": self.seed}, build)
        kept = read_kept(file)
        if hashlib.sha256(file.read_bytes()).hexdigest() != built["sha256"]:
            raise CheckpointError(f"{file}: is not what the run wrote; delete build.json beside it, to make it again")
        return kept

    def _built(self, iteration: int) -> dict[str, Any]:
        outputs = self.phases.outputs(iteration, "build")
        assert outputs is not None  # iterations are done in order
        return outputs

    def _evaluate(self, iteration: int, generator: Generator) -> None:
        """Measures greedy accuracy on the held-out problems."""
        if self.config.evaluation.greedy and self.test_problems:
            greedy = replace(self.config.sampling, samples=1, temperature=0.0)
            self.completions.of(iteration, "evaluate", generator, self.test_problems, greedy)

    def _sampler(self, generator: Generator, options: SamplingOptions) -> Sampler:
        config, path = self.config, generator.path
        self.check_weights(generator)
        dtype, device = config.model.dtype, config.training.device
        if generator != self._served:
            self.end_server()
            self._server = start_server(path, options, dtype=dtype, device=device, log=self.out / SERVER_LOG)
            self._served = generator
        return make_sampler(path, options, dtype=dtype, device=device, stop=self.task.stop, server=self._server)

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        return dtype


def _state_of(path: str) -> tuple[tuple[str, int, int, int], ...]:
    """Returns name, size, time of the last change and inode of each file of weights in a model directory."""
    found = [(file.name, file.stat()) for file in sorted(Path(path).glob("*.safetensors")) if file.exists()]
    return tuple((name, of.st_size, of.st_mtime_ns, of.st_ino) for name, of in found)


def finetuning_inputs(options: FinetuningOptions) -> dict[str, Any]:
    """Returns the options that decide the weights, by dotted key, without those that only save memory."""
    values = asdict(options)
    del values["gradient_checkpointing"]
    return {f"finetuning.{key}": value for key, value in values.items()}


def chosen_problems(problems: Sequence[Problem], limit: int | None, seed: int) -> list[Problem]:
    """Returns at most `limit` of some problems, drawn with `seed`, in their original order."""
    if limit is None or limit >= len(problems):
        return list(problems)
    return [problems[place] for place in sorted(random.Random(seed).sample(range(len(problems)), limit))]


def check_problems(
    config: OuterLoopConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    train: Sequence[Problem],
    test: Sequence[Problem],
) -> None:
    """Refuses a run that would stop later at a problem that is too long.

    Args:
        config: Configuration of the run.
        task: Task that the problems belong to.
        tokenizer: Tokenizer of the model.
        context: Number of tokens that the model can read; None where it has no limit.
        train, test: Training and held-out problems to check.

    Raises:
        DataError: A prompt does not fit into the model's context.
        ConfigError: A training example may not fit into a row.
    """
    new = config.sampling.max_new_tokens
    for hint in (False, True) if config.loop.rationalize else (False,):
        before = task.few_shot(hint) if config.sampling.few_shot else ""
        asked = [*train] if hint else [*train, *test]
        prompts = {problem.id: before + task.prompt(problem, hint) for problem in asked}
        requests = [Request(prompt, 0, f"problem {name}") for name, prompt in _longest(prompts.items())]
        check_lengths(requests, [encode_prompt(tokenizer, one.prompt) for one in requests], new, context)
    before = task.few_shot() if config.loop.few_shot_in_training and config.sampling.few_shot else ""
    for name, prompt in _longest((problem.id, before + task.prompt(problem)) for problem in train):
        needed = len(encode_prompt(tokenizer, prompt)) + new + 1
        if needed > config.loop.row_length:
            raise ConfigError(
                f"loop.row_length: got {config.loop.row_length}, but problem {name} with a completion of "
                f"sampling.max_new_tokens {new} may have {needed} tokens; raise it, or lower that"
            )


def _longest(prompts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(prompts, key=lambda item: -len(item[1]))[:LONGEST]
