"""Makes `thoughts.html` and `thoughts.json`: the thoughts at each position of a text, and the predictions before and
after.

`write_view` is read first, then `measure`, which thinks in pieces of bounded memory. A text longer than what a model
reads at once is processed in the overlapping windows at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config.objective import OBJECTIVE_PRESETS
from quietstar.config.options import parse_positions
from quietstar.data.sources import encode
from quietstar.data.tokenizer import pieces, vocabulary
from quietstar.errors import ConfigError, DataError
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.padding import read_padding
from quietstar.model.passes import CachedPass
from quietstar.model.thoughts import Prediction, Thoughts, base_entropy
from quietstar.objective.learning import LearnOutput, learn
from quietstar.reporting.viewer import VERSION, ViewOptions, write_page
from quietstar.runs.machine import environment

LOGIT_ELEMENTS = 1 << 25
"""Elements of the logits in memory at once (128 MiB in float32); the total is a few times as much."""

SCORE_ELEMENTS = 1 << 27
"""Elements of the attention scores of all heads in memory at once."""

_AGAINST_THE_MEAN = replace(OBJECTIVE_PRESETS["default"], policy_weight=0.0, baseline="mean")

Progress = Callable[[int, int], None]


def write_view(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    out: Path,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Writes the page of a text, and its data in a file ending in `.json` beside it; neither file is ever incomplete.

    Args:
        model: Thinking model to show the thoughts of.
        tokenizer: Tokenizer of the model's base.
        text: Text of at least two tokens.
        out: Path of the page, usually `thoughts.html`; its directory is made where it does not exist.
        progress: Function called with the number of positions that are done, and of all positions.
        options: Values by the names of the fields of `ViewOptions`.

    Returns:
        The path of the page.

    Raises:
        ConfigError: An option is unknown or out of range.
        DataError: The text is too short, or the tokenizer cannot encode it.
        OSError: A file cannot be written.
    """
    known = ViewOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigError(f"{name}: unknown, the options are {', '.join(known)}")
    return write_page(thoughts_of(model, tokenizer, text, ViewOptions(**options), progress), out)


def thoughts_of(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    options: ViewOptions,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the content of `thoughts.json`; `quietstar.reporting.viewer` describes its fields, `write_view` the
    errors.
    """
    config = model.config
    ids, cut = encode(text, tokenizer, options.tokens, options.text_name, options.special_tokens)
    _check_ids(ids, model.head.weight.shape[0], options.text_name)
    context = getattr(model.base.config, "max_position_embeddings", None)
    size = window_size(options.window, options.training_length, context, config.stream_length, config.lookahead)
    window = len(ids) if size is None else min(size, len(ids))
    one = options.greedy or config.thinking == "pause"
    count = options.thoughts or (1 if one else config.thoughts_per_position)
    temperature = config.temperature if options.temperature is None else options.temperature
    positions = measure(
        model,
        ids,
        thoughts=count,
        top_k=options.top_k,
        temperature=temperature,
        greedy=options.greedy,
        seed=options.seed,
        positions=options.positions,
        window=window,
        progress=progress,
    )
    texts = vocabulary(tokenizer, [*ids, *_ids_of(positions)])
    machine = environment()
    parameter = next(model.parameters())
    return {
        "version": VERSION,
        "title": f"{options.text_name} · thoughts of {options.model_name}",
        "model": {
            "name": options.model_name,
            "family": model.base.config.model_type,
            "vocabulary": int(model.head.weight.shape[0]),
            "thought_length": config.thought_length,
            "lookahead": config.lookahead,
            "interpolation": config.interpolation,
            "thinking": config.thinking,
        },
        "settings": {
            "thoughts": count,
            "top_k": options.top_k,
            "temperature": None if options.greedy else temperature,
            "seed": options.seed,
            "positions": options.positions,
            "tokens": options.tokens,
            "window": window,
            "overlap": overlap(window) if window < len(ids) else 0,
            "training_length": options.training_length,
            "device": parameter.device.type,
            "dtype": str(parameter.dtype).removeprefix("torch."),
        },
        "environment": {name: machine[name] for name in ("python", "packages", "git")},
        "text": {"name": options.text_name, "cut": cut, "tokens": ids, "pieces": pieces(ids, texts)},
        "vocabulary": texts,
        "positions": positions,
    }


def _check_ids(ids: Sequence[int], vocabulary_size: int, name: str) -> None:
    if max(ids) >= vocabulary_size:
        raise DataError(f"{name}: has token id {max(ids)}, but the model's vocabulary has {vocabulary_size} entries")


def _ids_of(positions: list[dict[str, Any]]) -> set[int]:
    """Returns every token id that the positions mention."""
    found: set[int] = set()
    for position in positions:
        listed = [*position["before"], *position.get("mean", ())]
        for thought in position["thoughts"]:
            listed += thought["after"]
            found.update(thought["tokens"] or ())
        found.update(token for token, _ in listed)
    return found


@torch.no_grad()
def measure(
    model: QuietStarForCausalLM,
    ids: Sequence[int],
    *,
    thoughts: int,
    top_k: int,
    temperature: float | None,
    greedy: bool,
    seed: int,
    positions: str,
    window: int,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Thinks at the positions of a text, in pieces of bounded memory.

    Args:
        model: Thinking model to measure.
        ids: Token ids of one text, at least 2.
        thoughts: Number of thoughts per position, K.
        top_k: Number of most probable tokens that are listed.
        temperature, greedy: Sampling options of the thoughts, as in `QuietStarForCausalLM.think`.
        seed: Seed of the thoughts; the same seed and settings give the same thoughts.
        positions: Positions of the whole text that think: `all`, `every:N` or `entropy:K`.
        window: Number of tokens that the model reads at once.
        progress: Function called with the number of positions that are done, and of all positions.

    Returns:
        The `positions` of the JSON file.
    """
    tokens = torch.tensor(ids, device=next(model.parameters()).device)
    most = max(1, _most_streams(model, min(window, len(ids))) // thoughts)
    rows_of = partial(windows, len(ids), window=window, lookahead=model.config.lookahead, most_anchors=most)
    anchors = _anchors(model, tokens, positions, rows_of)
    found: list[dict[str, Any]] = []
    for number, rows in enumerate(_batches(rows_of(anchors), most)):
        text = torch.stack([tokens[row.start : row.end] for row in rows])
        places = torch.tensor([[anchor - row.start for anchor in row.anchors] for row in rows], device=tokens.device)
        thought = model.think(
            text,
            anchors=places,
            thoughts_per_position=thoughts,
            temperature=temperature,
            greedy=greedy,
            seed=seed * 1_000_003 + number,  # by batch: one seed would draw the same numbers for the rows of each batch
        )
        output = learn(model, text, thoughts=thought, objective=_AGAINST_THE_MEAN, reuse_sampling_pass=False)
        prediction = model.predict(text, thoughts=thought)
        found += _records(rows, thought, output, prediction, top_k, model.config.interpolation)
        if progress is not None:
            progress(len(found), len(anchors))
    return found


def _most_streams(model: QuietStarForCausalLM, window: int) -> int:
    vocabulary = model.head.weight.shape[0]
    heads = getattr(model.base.config, "num_attention_heads", 1)
    scores = model.config.stream_length * (window + model.config.stream_length) * heads
    return max(1, min(LOGIT_ELEMENTS // vocabulary, SCORE_ELEMENTS // scores))


def _batches(rows: list[Window], most_anchors: int) -> list[list[Window]]:
    """Returns batches of neighbouring windows of one shape."""
    batches = []
    for (_, anchors), same in groupby(rows, key=lambda row: (row.end - row.start, len(row.anchors))):
        listed = list(same)
        size = max(1, most_anchors // anchors)
        batches += [listed[place : place + size] for place in range(0, len(listed), size)]
    return batches


def _anchors(
    model: QuietStarForCausalLM, tokens: Tensor, positions: str, rows_of: Callable[[Sequence[int]], list[Window]]
) -> list[int]:
    """Returns the positions of the whole text that think."""
    rule, value = parse_positions(positions)
    last = len(tokens) - 1
    if rule != "entropy":
        return list(range(0, last, int(value)))
    count = min(last, max(1, round(value * last) if value < 1 else int(value)))
    entropies = []
    for row in rows_of(range(last)):
        text = tokens[None, row.start : row.end]
        hidden = CachedPass(model, text, read_padding(text, None)).text_hidden
        first = row.anchors[0] - row.start
        entropies.append(base_entropy(hidden[:, first : first + len(row.anchors)], model.head)[0])
    return torch.cat(entropies).topk(count).indices.sort().values.tolist()


def _records(
    rows: list[Window],
    thoughts: Thoughts,
    output: LearnOutput,
    prediction: Prediction,
    top_k: int,
    interpolation: str,
) -> list[dict[str, Any]]:
    """Returns a batch as plain JSON values, with K thoughts per position."""
    count = thoughts.thoughts_per_position
    base = prediction.base_logits[:, ::count].log_softmax(-1).exp()
    talk = prediction.talk_logits.unflatten(1, (-1, count))
    # the paper's mixture is already one of log-probabilities; its probabilities do not sum to one
    talk = (talk if interpolation == "log_probs" else talk.log_softmax(-1)).exp()
    before, after, mean = _most_probable(base, top_k), _most_probable(talk, top_k), _most_probable(talk.mean(2), top_k)

    targets = output.target_mask[:, ::count].sum(-1).tolist()
    base_logprob = _lists(-output.base_nll_at_target[:, ::count])
    talk_logprob, weight, reward, advantage = (
        _lists(value.unflatten(1, (-1, count)))
        for value in (-output.talk_nll, output.mixing_weight[..., 0], output.reward, output.advantage)
    )
    logprob = _lists(thoughts.logprob.sum(-1).unflatten(1, (-1, count)))
    chosen = thoughts.tokens.unflatten(1, (-1, count)).tolist()

    records = []
    for row, window in enumerate(rows):
        for place, anchor in enumerate(window.anchors):
            ahead = targets[row][place]
            record = {
                "token": anchor + 1,
                "base": base_logprob[row][place][:ahead],
                "before": before[row][place],
            }
            if count > 1:
                record["mean"] = mean[row][place]
            record["thoughts"] = [
                {
                    "tokens": None if min(chosen[row][place][k]) < 0 else chosen[row][place][k],
                    "logprob": logprob[row][place][k],
                    "weight": weight[row][place][k],
                    "talk": talk_logprob[row][place][k][:ahead],
                    "reward": reward[row][place][k],
                    "advantage": advantage[row][place][k] if count > 1 else None,
                    "after": after[row][place][k],
                }
                for k in range(count)
            ]
            records.append(record)
    return records


def _most_probable(probability: Tensor, count: int) -> Any:
    """Returns nested lists of [..., count] pairs of token id and probability."""
    values, ids = probability.topk(min(count, probability.shape[-1]), dim=-1)

    def pairs(ids: Any, values: Any) -> Any:
        if isinstance(ids[0], int):
            return [[token, _significant(value)] for token, value in zip(ids, values, strict=True)]
        return [pairs(*both) for both in zip(ids, values, strict=True)]

    return pairs(ids.tolist(), values.tolist())


def _lists(values: Tensor) -> Any:
    """Returns nested lists of numbers with 4 decimals; None for values that are not finite."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(part) for part in value]
        return round(value, 4) + 0.0 if math.isfinite(value) else None  # + 0.0: no -0.0

    return rounded(values.tolist())


def _significant(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Window:
    """A part of a text, and the positions that think in it.

    Args:
        start: Position of the window's first token in the text.
        end: Position after the window's last token in the text.
        anchors: Positions that think, in the whole text and increasing; each is in one window only.
    """

    start: int
    end: int
    anchors: tuple[int, ...]


def overlap(window: int) -> int:
    """Returns the least number of tokens before every position outside the first window."""
    return window // 2


def windows(length: int, anchors: Sequence[int], window: int, lookahead: int, most_anchors: int) -> list[Window]:
    """Returns the windows of a text.

    A position thinks in the first window that holds all tokens that its thought is measured on. From the second window
    on, at least half a window of text precedes it there.

    Args:
        length: Number of tokens of the text.
        anchors: Positions that think, increasing, all before the last token.
        window: Number of tokens of a window.
        lookahead: Number of tokens that a thought is measured on.
        most_anchors: Largest number of positions that think at once; windows with more are repeated.
    """
    found = []
    first = 0
    while first < length - 1:
        start = max(0, first - overlap(window))
        end = min(length, start + window)
        beyond = length - 1 if end == length else end - lookahead
        own = [anchor for anchor in anchors if first <= anchor < beyond]
        found += [
            Window(start, end, tuple(own[place : place + most_anchors])) for place in range(0, len(own), most_anchors)
        ]
        first = beyond
    return found


def window_size(
    window: int | None, training_length: int | None, context: int | None, stream: int, lookahead: int
) -> int | None:
    """Returns the number of tokens of a window; None where a text of any length is one window.

    Args:
        window: Number of tokens asked for; None for the length of training texts, or where that is unknown, as many as
            the context holds.
        training_length: Number of tokens of the model's training texts, where it is known.
        context: Number of positions of the base; None where it has no limit.
        stream: Number of tokens of a thought's stream, which reaches beyond the text.
        lookahead: Number of tokens that a thought is measured on.

    Raises:
        ConfigError: The window is too small for the lookahead, or too large for the context.
    """
    least = 2 * lookahead + 2
    most = None if context is None else context - stream
    if most is not None and most < least:
        raise ConfigError(
            f"window: the base has {context} positions and a thought takes {stream}; at least {least} tokens of text "
            "are needed besides"
        )
    if window is None:
        known = [size for size in (training_length, most) if size is not None]
        return max(least, min(known)) if known else None
    if window < least or (most is not None and window > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"window: got {window}, needs {wanted} tokens")
    return window
