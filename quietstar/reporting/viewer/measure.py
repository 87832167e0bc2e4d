"""What was thought at each position of a text, what it was worth, and what was predicted before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from quietstar.model import QuietStarForCausalLM
from quietstar.model.anchors import base_entropy
from quietstar.model.padding import read_padding
from quietstar.model.passes import CachedPass
from quietstar.model.thoughts import Prediction, Thoughts
from quietstar.objective import PRESETS, LearnOutput
from quietstar.positions import parse_positions
from quietstar.reporting.viewer.windows import Window, windows

LOGIT_ELEMENTS = 1 << 25
"""Elements of the logits at once (128 MiB in float32); a few times as much is needed in all."""
SCORE_ELEMENTS = 1 << 27
"""The same for attention scores of all heads."""
_AGAINST_THE_MEAN = replace(PRESETS["default"], policy_weight=0.0, baseline="mean")
Progress = Callable[[int, int], None]


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
        model: The thinking model.
        ids: Of one text, at least 2.
        thoughts: K.
        top_k: Most probable tokens that are listed.
        temperature, greedy: Of the thoughts, as in `QuietStarForCausalLM.think`.
        seed: The same seed and settings give the same thoughts.
        positions: `all`, `every:N` or `entropy:K`, of the whole text.
        window: Tokens that the model reads at once.
        progress: Called with the number of positions that are done, and of all.

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
            seed=seed * 1_000_003 + number,  # of its own: the same numbers are drawn for the rows of each batch
        )
        output = model.learn(text, thoughts=thought, objective=_AGAINST_THE_MEAN, reuse_sampling_pass=False)
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
    """Neighbours of one shape side by side."""
    batches = []
    for (_, anchors), same in groupby(rows, key=lambda row: (row.end - row.start, len(row.anchors))):
        listed = list(same)
        size = max(1, most_anchors // anchors)
        batches += [listed[place : place + size] for place in range(0, len(listed), size)]
    return batches


def _anchors(
    model: QuietStarForCausalLM, tokens: Tensor, positions: str, rows_of: Callable[[Sequence[int]], list[Window]]
) -> list[int]:
    """The positions of the whole text that think."""
    rule, value = parse_positions(positions)
    last = len(tokens) - 1
    if rule != "entropy":
        return list(range(0, last, int(value)))
    count = min(last, max(1, round(value * last) if value < 1 else int(value)))
    entropies = []
    for row in rows_of(range(last)):
        text = tokens[None, row.start : row.end]
        hidden = CachedPass(model, text, read_padding(text, None), False).text_hidden
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
    """Plain JSON values of a batch, K thoughts a position."""
    count = thoughts.thoughts_per_position
    base = prediction.base_logits[:, ::count].log_softmax(-1).exp()
    talk = prediction.talk_logits.unflatten(1, (-1, count))
    # the paper's mixture is one of log-probabilities already; it does not sum to one
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
    """Nested lists of [..., count] pairs of id and probability."""
    values, ids = probability.topk(min(count, probability.shape[-1]), dim=-1)

    def pairs(ids: Any, values: Any) -> Any:
        if isinstance(ids[0], int):
            return [[token, _significant(value)] for token, value in zip(ids, values, strict=True)]
        return [pairs(*both) for both in zip(ids, values, strict=True)]

    return pairs(ids.tolist(), values.tolist())


def _lists(values: Tensor) -> Any:
    """Nested lists of numbers with 4 decimals, None for what is not finite."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(part) for part in value]
        return round(value, 4) + 0.0 if math.isfinite(value) else None  # + 0.0: no -0.0

    return rounded(values.tolist())


def _significant(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None
