"""`python -m quietstar.train`: train a model to think. Without arguments it runs the embedded default."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from quietstar.command_line import parse_train_config, run_command, to_yaml
from quietstar.config import ModelOptions, TrainConfig, run_options
from quietstar.data import check_vocabulary, load_texts, load_tokenizer
from quietstar.model import QuietStarConfig, QuietStarForCausalLM
from quietstar.model.loading import load_causal_lm, load_configuration
from quietstar.training import Trainer, TrainingResult
from quietstar.training.methods import Evaluate, compute_step, evaluate_on
from quietstar.training.output_dir import make_output_dir

KEPT_OF_A_THINKING_MODEL = ("initial_mixing_weight", "mixing_activation", "embedding_scale", "start_text", "end_text")
"""Options that only shape the weights of a model that does not think yet."""


def thinking_options(options: ModelOptions) -> dict[str, Any]:
    """The part of the options that `QuietStarForCausalLM.from_base` takes as they are."""
    names = (
        "thought_length lookahead thoughts_per_position interpolation mixing_activation initial_mixing_weight "
        "start_text end_text embedding_scale thinking temperature backend"
    )
    return {name: getattr(options, name) for name in names.split()}


def train(config: TrainConfig, evaluate: Evaluate | None = None, label: str = "train") -> TrainingResult:
    """Train `config.model.path` on `config.data.path`.

    Writes `config.yaml`, `metrics.jsonl` and `checkpoints/` to `config.output_dir`; the last checkpoint is a model
    directory that `AutoModelForCausalLM.from_pretrained` loads once `quietstar` is imported.

    Args:
        config: A validated configuration that names a model and a text.
        evaluate: Measures the model instead of `evaluate_on` the held-out text; lower `loss` is better.
        label: Stands before the progress.

    Raises:
        ConfigError, DataError, UnsupportedBackboneError: For what is wrong with the model, the text or an option.
        CheckpointError: `config.output_dir` holds a run of other options, or only damaged checkpoints.
        NonFiniteError: A loss or gradient was not a number; the last checkpoint is intact.
    """
    assert config.model.path is not None  # checked with the configuration
    tokenizer = load_tokenizer(config.model.path)
    training_texts, held_out = load_texts(config.data, tokenizer)
    make_output_dir(Path(config.output_dir))  # before the model, which may take minutes to load
    model = load_model(config.model, tokenizer)
    trainer = Trainer(
        model,
        compute_step(config),
        training_texts.tokens,
        config.training,
        config.output_dir,
        evaluate=evaluate or (evaluate_on(held_out.tokens, config) if held_out is not None else None),
        evaluate_at_start=True,
        tokenizer=tokenizer,
        config_yaml=to_yaml(config),
        run_options=run_options(config),
        progress_label=label,
    )
    return trainer.run()


def load_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """The model named by the options: a base model made to think, or a thinking model as it was saved.

    A saved thinking model keeps START, END and its mixing head; of the options those hold that change no weights, such
    as `thought_length` and `lookahead`.

    Raises:
        ConfigError, UnsupportedBackboneError: It can't be used; the message says why.
    """
    assert options.path is not None
    dtype = getattr(torch, options.dtype)
    thinking = thinking_options(options)
    if load_configuration(options.path).model_type == QuietStarConfig.model_type:
        saved = load_causal_lm(options.path, dtype)
        assert isinstance(saved, QuietStarForCausalLM)
        model = saved
        for name in KEPT_OF_A_THINKING_MODEL:
            thinking.pop(name)
        for name, value in thinking.items():
            setattr(model.config, name, value)
    else:
        torch.manual_seed(0)  # the mixing head's first layers are random
        model = QuietStarForCausalLM.from_base(options.path, tokenizer, dtype=dtype, **thinking)
    check_vocabulary(tokenizer, model.head.weight.shape[0])
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        config = parse_train_config(argv)
        transformers.utils.logging.disable_progress_bar()  # of loading and saving; the training has its own
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        if config.preset == "textbook":
            from quietstar.textbook.experiment import run_textbook

            run_textbook(config)
            return
        result = train(config)
        print(f"trained {result.steps} steps in {result.seconds:.0f} s: {Path(result.checkpoint)}")
        if result.eval_metrics:
            values = result.eval_metrics
            names = [name for name in ("text_nll", "base_nll", "talk_nll", "gain") if name in values]
            print("held-out text: " + ", ".join(f"{name} {values[name]:.4f}" for name in names))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
