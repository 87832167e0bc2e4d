"""A training run made from its options: text, model, trainer, and the report written beside checkpoints.

First come the samples of thoughts that the report shows, then `train`, which puts everything together.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config.command_line import to_yaml
from quietstar.config.objective import OBJECTIVE_PRESETS
from quietstar.config.thinking import ThinkingOptions
from quietstar.config.training import ModelOptions, TrainConfig, replay_stage, run_options
from quietstar.data.batches import IndexedBatches
from quietstar.data.loading import load_batches
from quietstar.data.packing import PackedTexts
from quietstar.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint, tokenizer_text
from quietstar.errors import ConfigError
from quietstar.model.adapters import base_fingerprint, has_adapters
from quietstar.model.backbone import replayed_products
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.loading import load_causal_lm, load_configuration
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.sharding import call, shard_model
from quietstar.objective.learning import learn
from quietstar.reporting.train_report import write_report
from quietstar.runs.files import SAMPLES, make_output_dir, write_whole
from quietstar.runs.machine import environment
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.loggers import make_loggers
from quietstar.training.metrics import TrainingResult
from quietstar.training.ranks import ALONE, Ranks
from quietstar.training.step_functions import EVALUATION_SEED, Evaluate, compute_step, evaluate_on
from quietstar.training.trainer import Trainer

BEFORE, AFTER = 48, 12
"""Numbers of tokens of text that are shown before and after a thought."""
_NO_POLICY = replace(OBJECTIVE_PRESETS["default"], policy_weight=0.0)
"""Objective without REINFORCE: a single thought per position has no other thoughts to be compared with."""


@torch.no_grad()
def sample_thoughts(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    attention_mask: Tensor | None,
    positions: str,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Samples thoughts at random places of texts.

    The places depend only on the texts and the seed, so that thoughts of different steps can be compared; with the
    positions `entropy:K` they depend on the model too.

    Args:
        model: Thinking model that makes the thoughts.
        tokenizer: Tokenizer of the base model.
        tokens: Token ids of a few texts, int64 [B, L].
        attention_mask: Document numbers of the tokens, 0 at padding, int64 [B, L]; None: each row is one document
            without padding.
        positions: Positions that think, as in the option `model.positions`.
        count: Largest number of places.
        seed: Seed of the places and of the thoughts.

    Returns:
        One plain JSON object for each place, in an order that does not depend on the thoughts: `text` and `position`,
        both from 0; `before`, `thought` and `after`, the text around the thought and the thought itself (null where
        `thinking` is `pause`); `reward` (sum over all lookahead tokens, in nats); and for the next token
        `mixing_weight`, `base_nll` and `talk_nll`. Numbers that are not finite are null.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    mask = None if attention_mask is None else attention_mask.to(device)
    thoughts = model.think(tokens, mask, anchors=positions, thoughts_per_position=1, seed=seed)
    output = learn(model, tokens, mask, thoughts=thoughts, objective=_NO_POLICY, reuse_sampling_pass=False)

    lottery = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).tolist()
    anchors = thoughts.anchor.tolist()
    valid = output.target_mask[..., 0].tolist()
    streams = {
        (row, anchor): stream
        for row, row_anchors in enumerate(anchors)
        for stream, anchor in enumerate(row_anchors)
        if valid[row][stream]
    }
    chosen = sorted(streams, key=lambda place: lottery[place[0]][place[1]])[:count]

    ids, thought_ids = tokens.tolist(), thoughts.tokens.tolist()
    documents = torch.ones_like(tokens).tolist() if mask is None else mask.tolist()
    samples = []
    for row, anchor in chosen:
        stream = streams[row, anchor]
        here = documents[row][anchor]
        before = [token for token, name in zip(ids[row][: anchor + 1], documents[row], strict=False) if name == here]
        following = slice(anchor + 1, anchor + 1 + AFTER)
        after = [
            token for token, name in zip(ids[row][following], documents[row][following], strict=True) if name == here
        ]
        thought = thought_ids[row][stream]
        samples.append(
            {
                "text": row,
                "position": anchor,
                "before": ("…" if len(before) > BEFORE else "") + tokenizer_text(tokenizer, before[-BEFORE:]),
                "thought": None if min(thought) < 0 else _continuation(tokenizer, before[-BEFORE:], thought),
                "after": _continuation(tokenizer, before[-BEFORE:], after),
                "reward": _finite(output.reward[row, stream]),
                "mixing_weight": _finite(output.mixing_weight[row, stream, 0]),
                "base_nll": _finite(output.base_nll_at_target[row, stream, 0]),
                "talk_nll": _finite(output.talk_nll[row, stream, 0]),
            }
        )
    return samples


def write_samples(run_directory: Path | str, step: int, samples: Sequence[dict[str, Any]]) -> Path:
    """Writes `samples/step-00000100.json` in a run directory, whole or not at all.

    Args:
        run_directory: Directory of the run, which exists.
        step: Number of optimizer steps done.
        samples: Samples that `sample_thoughts` returned.

    Returns:
        The path of the file.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(run_directory) / SAMPLES / f"step-{step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"step": step, "samples": list(samples)}, indent=1, allow_nan=False) + "\n")
    return path


def _continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text that token ids add to the text before them; decoded alone, many would lose their first space."""
    start, whole = tokenizer_text(tokenizer, before), tokenizer_text(tokenizer, [*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else tokenizer_text(tokenizer, ids)


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


SAMPLED_TEXTS, SAMPLED_THOUGHTS = 8, 24
"""Numbers of held-out texts, and of places in them, whose thoughts the report shows."""

KEPT_OF_A_THINKING_MODEL = ("initial_mixing_weight", "mixing_activation", "embedding_scale", "start_text", "end_text")
"""Options that only apply to a base model that does not think yet; a thinking model keeps its own values."""


def thinking_options(options: ModelOptions) -> dict[str, Any]:
    """Returns the options that `QuietStarForCausalLM.from_base` takes unchanged."""
    names = [field.name for field in fields(ThinkingOptions)]
    return {name: getattr(options, name) for name in (*names, "start_text", "end_text")}


def train(
    config: TrainConfig, evaluate: Evaluate | None = None, label: str = "train", ranks: Ranks = ALONE
) -> TrainingResult:
    """Trains `config.model.path` on `config.data.path`.

    Writes `config.yaml`, `environment.json`, `metrics.jsonl`, `events.jsonl`, `samples/`, `checkpoints/` and
    `report.html` to `config.output_dir`; the last checkpoint is a model directory that
    `AutoModelForCausalLM.from_pretrained` loads once `quietstar` is imported.

    Args:
        config: Validated configuration that names a model and a text.
        evaluate: Function that measures the model; a lower `loss` is better. None: `evaluate_on` the held-out text.
        label: Text before the progress on stderr.
        ranks: Processes of the run, which all call this function.

    Raises:
        ConfigError, DataError, UnsupportedBackboneError: An option, the text or the model cannot be used.
        CheckpointError: `config.output_dir` holds a run with other options, or only damaged checkpoints.
        NonFiniteError: A loss or gradient is NaN or infinite; the last checkpoint is intact.
        OutOfMemoryError: The memory is not enough for one text at a time.
        Interrupted: A signal has stopped training; the last finished step is saved.
    """
    assert config.model.path is not None  # checked with the configuration
    options = config.training
    tokenizer = load_tokenizer(config.model.path)
    batches, held_out = load_batches(
        config.data,
        tokenizer,
        batch_size=options.batch_size,
        seed=options.seed,
        held_out_texts=options.eval_batches * options.batch_size,
    )
    out = Path(config.output_dir)
    make_output_dir(out)  # before the model, which may take minutes to load
    model = apply_finetuning(load_model(config.model, tokenizer), config.finetuning, options.method)
    if options.method == "quietstar":
        replayed_products(model, replay_stage(options), "training.")  # refuses what the model can't do
    if ranks.mesh is not None:
        if has_adapters(model):
            model.known_fingerprint = base_fingerprint(model)  # of the weights as they are before they are cut
        shard_model(
            model,
            ranks.model_mesh,
            keep_gathered=config.distributed.keep_gathered,
            master_weights=options.master_weights,
        )
    if evaluate is None and held_out is not None:
        evaluate = evaluate_on(held_out.tokens, config, held_out.attention_mask, ranks)
    identity = {f"tokenizer.{name}": value for name, value in tokenizer_fingerprint(tokenizer).items()}
    if held_out is not None:  # evaluations on different texts cannot be compared
        identity["held_out_text.sha256"] = IndexedBatches(held_out.tokens, 1, 0).fingerprint()["sha256"]
    trainer = Trainer(
        model,
        compute_step(config),
        batches,
        options,
        out,
        evaluate=evaluate,
        evaluate_at_start=True,
        after_evaluation=_reporter(config, tokenizer, held_out, ranks) if options.report else None,
        tokenizer=tokenizer,
        config_yaml=to_yaml(config),
        run_options={**run_options(config), **identity},
        environment=environment(),
        make_loggers=lambda start: make_loggers(options.log_to, out, asdict(config), start),
        progress_label=label,
        ranks=ranks,
    )
    result = trainer.run()
    if options.report and ranks.leads:
        try:
            write_report(out)
        except Exception as error:  # a failed report must not fail the training
            warnings.warn(f"the last report failed: {type(error).__name__}: {error}", stacklevel=2)
    return result


def _reporter(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, held_out: PackedTexts | None, ranks: Ranks
) -> Callable[[QuietStarForCausalLM, int], None]:
    """Returns the function that writes, after each evaluation, thoughts at the same held-out places and the report."""

    def report(model: QuietStarForCausalLM, step: int) -> None:
        try:
            if held_out is not None and config.training.method == "quietstar":
                # no more texts at once than a step has: they must fit into the memory too
                own = len(ranks.share(config.training.batch_size))
                count = min(SAMPLED_TEXTS, config.training.micro_batch_size or own)
                mask = None if held_out.attention_mask is None else held_out.attention_mask[:count]
                samples = call(
                    model,
                    sample_thoughts,
                    tokenizer,
                    held_out.tokens[:count],
                    mask,
                    config.model.positions,
                    SAMPLED_THOUGHTS,
                    EVALUATION_SEED,
                )
                if ranks.leads:
                    write_samples(config.output_dir, step, samples)
        finally:
            if ranks.leads:
                write_report(config.output_dir)

    return report


def load_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """Loads the model that the options name: a base model, which becomes a thinking model, or a saved thinking model.

    A saved thinking model keeps START, END and the mixing head. Only options that change no weights apply to it, such
    as `thought_length` and `lookahead`.

    Raises:
        ConfigError, UnsupportedBackboneError: The model can't be used; the message says why.
    """
    assert options.path is not None
    dtype = getattr(torch, options.dtype)
    thinking = thinking_options(options)
    if load_configuration(options.path).model_type == QuietStarConfig.model_type:
        saved = load_causal_lm(options.path, dtype)
        assert isinstance(saved, QuietStarForCausalLM)
        if saved.dtype != dtype:  # adapters are loaded in the dtype of their training
            raise ConfigError(f"model.dtype: got {options.dtype}, but the adapters in {options.path} are {saved.dtype}")
        model = saved
        for name, value in thinking.items():
            if name not in KEPT_OF_A_THINKING_MODEL:
                setattr(model.config, name, value)
    else:
        torch.manual_seed(0)  # the mixing head's first layers are random
        model = QuietStarForCausalLM.from_base(options.path, tokenizer, dtype=dtype, **thinking)
    check_vocabulary(tokenizer, model.head.weight.shape[0])
    return model
