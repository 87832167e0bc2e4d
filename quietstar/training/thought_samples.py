"""Samples of thoughts within their texts, for the report of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import tokenizer_text
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.objective.learning import learn
from quietstar.objective.options import PRESETS
from quietstar.runs.files import SAMPLES, write_whole

BEFORE, AFTER = 48, 12
"""Number of tokens of text that are shown before and after a thought."""
_NO_POLICY = replace(PRESETS["default"], policy_weight=0.0)
"""Objective without REINFORCE: with one thought per position there is no other thought as a baseline."""


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
        attention_mask: Document numbers of the tokens, 0 at padding, int64 [B, L], as in
            `quietstar.data.batches.Batch`; None: one document per text, unpadded.
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
