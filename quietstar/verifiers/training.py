"""The training that all kinds of verifiers share: the model to start from, the run, and the directory that it makes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from quietstar.config.loops import GeneratorOptions, VerifierOptions
from quietstar.config.options import Dtype, check
from quietstar.config.parsing import check_type, read_json_file, shown
from quietstar.config.training import FinetuningOptions, TrainingOptions, check_micro_batch
from quietstar.data.batches import Batch, IndexedBatches
from quietstar.data.examples import Example
from quietstar.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint
from quietstar.errors import CheckpointError, ConfigError, DataError
from quietstar.model.adapters import absolute, base_fingerprint, has_adapters, merge_adapters
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.runs.checkpoints import MAY_CHANGE, describe
from quietstar.runs.files import changed_options, saving, write_json
from quietstar.runs.machine import resolve_device
from quietstar.training.step import ModelT, StepResult
from quietstar.training.trainer import Trainer
from quietstar.verifiers.pairs import Labelled, Pair, Rows, token_logprobs

VERIFIER = "verifier.json"
MODEL, RUN = "model", "run"
"""Names of the directories of the verifier and of the run that made it."""
FORMAT = 1


def load_policy(
    path: str, dtype: str | None = "float32", backend: str = "auto", device: torch.device | str = "cpu"
) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]:
    """Loads a plain causal language model that keeps the documents of a row apart, and its tokenizer.

    Args:
        path: Directory or hub name of the model.
        dtype: Type of the weights; None: the checkpoint's type.
        backend: Backend of the kernels, such as `auto`.
        device: Device to put the model on.

    Raises:
        ConfigError: The model cannot be loaded, or the tokenizer belongs to another model.
        UnsupportedBackboneError: The documents of a packed row would influence each other.
    """
    tokenizer = load_tokenizer(path)
    model = QuietStarForCausalLM.from_base(
        path,
        start_text=[0],  # nothing thinks here
        end_text=[0],
        dtype=None if dtype is None else getattr(torch, dtype),
        backend=backend,
    )
    embedding: Any = model.base.get_input_embeddings()
    check_vocabulary(tokenizer, embedding.weight.shape[0])
    nn.Module.to(model, device)  # transformers' own is untyped
    return model, tokenizer


@dataclass(frozen=True)
class LabelledData:
    """The data that verifiers are trained on.

    Args:
        completions: Right and wrong completions of the problems.
        pairs: Pairs of a right and a wrong completion of one problem, drawn from `completions`.
    """

    completions: Sequence[Labelled]
    pairs: Sequence[Pair]


TokenScores = Callable[[Sequence[Example], int, int], list[Tensor]]
"""Function (examples, tokens per row, rows per pass) -> float64 [tokens of its completion] for each example."""
Train = Callable[[GeneratorOptions, LabelledData, VerifierOptions, TrainingOptions, FinetuningOptions, Path], Path]


@dataclass(frozen=True)
class Kind:
    """One kind of verifier: its training, the content of its directory, its scores and its names.

    Args:
        train: Function (base model, data, options of the verifier, of the training loop and of fine-tuning, directory)
            -> directory of the verifier in it.
        scores: Names of the scores, each a way to make one number of a completion's token scores; the first is the
            default.
        label: Name of the kind in tables and on pages.
        labels: Names, in tables and on pages, of the scores that a V-STaR run measures.
        probabilities: Whether scores are probabilities that a solution is right; otherwise they are log-likelihoods in
            nats.
        options: Names of the `VerifierOptions` that no other kind reads.
        load: Function (language model, directory of the verifier, content of `verifier.json`) -> token scores, and the
            weights that they need besides the language model's.
    """

    train: Train
    scores: tuple[str, ...]
    label: str
    labels: Mapping[str, str]
    probabilities: bool = False
    options: tuple[str, ...] = ()
    load: Callable[[QuietStarForCausalLM, Path, Mapping[str, Any]], tuple[TokenScores, Sequence[Tensor]]] = (
        lambda policy, *_: (partial(token_logprobs, policy), ())
    )

    @property
    def names(self) -> dict[str, str]:
        """Names of the measured scores in tables, by score."""
        return {how: f"{self.label} ({name})" for how, name in self.labels.items()}


class VerifierRun:
    """The training of one verifier in a directory: `run/` while it is trained, then `model/`.

    Args:
        kind: Name of the kind of verifier, such as `dpo`.
        base: Model that the training starts from.
        options: Options of the verifier and of its training.
        training: Options of the training loop: `seed`, `device` and all else that `options` does not set.
        finetuning: Weights to train; adapters are merged at the end.
        out: Directory for this verifier alone.

    Attributes:
        policy: Model loaded from `base`, on the device of the training.
        tokenizer: Tokenizer of the base model.

    Raises:
        ConfigError: The base cannot be loaded, or an option is out of range.
    """

    def __init__(
        self,
        kind: str,
        base: GeneratorOptions,
        options: VerifierOptions,
        training: TrainingOptions,
        finetuning: FinetuningOptions,
        out: Path,
    ) -> None:
        check(options, "verifier.")
        check_micro_batch("verifier", options)
        if base.path is None:
            raise ConfigError("model.path: missing; a verifier starts from a causal language model")
        self.kind, self.base, self.options, self.finetuning, self.out = kind, base, options, finetuning, out
        self.device = resolve_device(training.device)
        self.policy, self.tokenizer = load_policy(base.path, base.dtype, base.backend, self.device)
        self.fingerprint = base_fingerprint(self.policy)
        self._training = training

    @property
    def model_directory(self) -> Path:
        """Directory of the trained verifier."""
        return self.out / MODEL

    def identity(self, rows: Rows) -> dict[str, Any]:
        """Returns everything that decides which verifier comes out, by dotted key."""
        loop = {key: value for key, value in asdict(self.training_options(len(rows))).items() if key not in MAY_CHANGE}
        groups = {"verifier": asdict(self.options), "finetuning": asdict(self.finetuning), "training": loop}
        del groups["verifier"]["score"], groups["verifier"]["baselines"]  # they concern its use, and other verifiers
        del groups["verifier"]["micro_batch_size"], groups["finetuning"]["gradient_checkpointing"]
        flat = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        steps = self.training_options(len(rows)).steps
        own = {"kind": self.kind, "model.fingerprint": self.fingerprint, "rows": rows.sha256(), "steps": steps}
        return {**own, "tokenizer": tokenizer_fingerprint(self.tokenizer)["sha256"], **flat}

    def is_finished(self, rows: Rows) -> bool:
        """Returns whether this verifier is already trained.

        Raises:
            CheckpointError: The directory holds a verifier of other data or options.
        """
        if not self.model_directory.exists():
            return False
        before = read_description(self.model_directory).get("identity", {})
        if changed := changed_options(before, self.identity(rows)):
            raise CheckpointError(
                f"{self.model_directory}: was trained with other options: {'; '.join(changed)}. Set it back, choose "
                "another directory, or remove this one"
            )
        return True

    def training_options(self, rows: int) -> TrainingOptions:
        """Returns the options of the training loop for a number of rows."""
        options = self.options
        steps = options.steps or max(1, math.ceil(options.epochs * rows / options.batch_size))
        return replace(
            self._training,
            method="language_modeling",
            steps=steps,
            batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            eval_every=0,
        )

    def train(
        self,
        model: ModelT,
        step: Callable[[ModelT, Batch, int], StepResult],
        rows: Rows,
        values: Tensor | None,
        description: Mapping[str, Any],
        save_more: Callable[[Path], None] = lambda directory: None,
    ) -> Path:
        """Trains a model around `policy`, or continues its training, and writes the verifier's directory.

        Args:
            model: Policy itself, or a module that contains it.
            step: Step function of the trainer.
            rows: Rows to train on.
            values: Numbers that the batches carry for each row, float32 [n, ...]; None: none.
            description: Further content of `verifier.json`.
            save_more: Function that writes the verifier's other files into the given directory.

        Returns:
            The verifier's directory.
        """
        options, identity = self.training_options(len(rows)), self.identity(rows)
        data = IndexedBatches(
            rows.tokens,
            options.batch_size,
            options.seed,
            rows.attention_mask,
            loss_mask=rows.loss_mask,
            values=values,
        )
        label = f"train the verifier ({self.kind})"
        result = Trainer(model, step, data, options, self.out / RUN, run_options=identity, progress_label=label).run()
        if has_adapters(self.policy):
            merge_adapters(self.policy)
        new = self.model_directory.with_name(f"{MODEL}.new")
        shutil.rmtree(new, ignore_errors=True)
        with saving(new):
            self.tokenizer.save_pretrained(new)
            self.policy.base.save_pretrained(new)
            save_more(new)
        write_json(
            new / VERIFIER,
            {
                "format": FORMAT,
                "files": {file.name: describe(file) for file in sorted(new.glob("*.safetensors"))},
                "kind": self.kind,
                "dtype": self.base.dtype,
                "score": self.options.score,
                "beta": self.options.beta,
                "tokenizer": tokenizer_fingerprint(self.tokenizer),
                "reference": {
                    "path": absolute(str(self.base.path)),
                    "dtype": self.base.dtype,
                    "fingerprint": self.fingerprint,
                },
                **description,
                "metrics": result.train_metrics,
                "identity": identity,
            },
        )
        new.rename(self.model_directory)
        shutil.rmtree(self.out / RUN / "checkpoints", ignore_errors=True)  # the optimizer's state is twice the model
        return self.model_directory


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str, generator: str | None) -> None:
    """Checks that the generator of the completions and the model that a verifier starts from have the same tokenizer.

    Args:
        tokenizer: Tokenizer of the model that the verifier starts from.
        path: Directory or hub name of that model, for the message.
        generator: Model directory or hub name of the generator; None: not known.

    Raises:
        ConfigError: The tokenizers differ; the message names both models.
    """
    if generator is None or tokenizer_fingerprint(load_tokenizer(generator)) == tokenizer_fingerprint(tokenizer):
        return
    raise ConfigError(
        f"verifier: it would start from {path}, whose tokenizer is not that of the generator {generator}; start it "
        "from a model with the generator's tokenizer"
    )


def check_files(directory: Path, description: Mapping[str, Any]) -> None:
    """Compares the weights of a verifier with the sizes and hashes in `verifier.json`; older ones have none.

    Raises:
        CheckpointError: A file is missing, or is not as it was written.
    """
    for name, written in dict(description.get("files") or {}).items():
        file = directory / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {VERIFIER} names it, so put it back or train the verifier again")
        if describe(file) != written:
            raise CheckpointError(
                f"{file}: its content has changed since it was written; put back what was there, or train the verifier "
                "again"
            )


def read_description(directory: Path) -> dict[str, Any]:
    """Reads `verifier.json`.

    Raises:
        CheckpointError: The file is missing, damaged or of another format.
    """
    file = directory / VERIFIER
    try:
        description = read_json_file(file)
        check_type(description, _Description, "description")
    except (OSError, DataError) as error:
        raise CheckpointError(f"{file}: cannot be read as the description of a verifier ({error})") from None
    if description["format"] != FORMAT:
        raise CheckpointError(f"{file}: format {description['format']}, this version reads format {FORMAT}")
    for name in description.get("files") or {}:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{file}: files: got {shown(name)}, needs names of safetensors files beside it")
    return dict(description)


@dataclass(frozen=True)
class _File:
    size: int
    sha256: str


@dataclass(frozen=True)
class _Reference:
    path: str
    fingerprint: str
    dtype: Dtype | None = None


@dataclass(frozen=True)
class _Description:
    """What is read of `verifier.json`."""

    format: int
    kind: str = ""
    score: str | None = None
    beta: float = 1.0
    orm_loss: Literal["bce", "mse"] = "bce"
    files: dict[str, _File] | None = None
    tokenizer: dict[str, Any] | None = None
    reference: _Reference | None = None
    identity: dict[str, Any] = field(default_factory=dict)
