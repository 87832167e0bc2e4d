"""Sampled thoughts in the texts that they were thought in."""

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

from quietstar.config.objective import OBJECTIVE_PRESETS
from quietstar.data.tokenizer import tokenizer_text
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.objective.learning import learn
from quietstar.runs.files import SAMPLES, write_whole

BEFORE, AFTER = 48, 12
"""Tokens of text that are shown before and after a thought."""
_NO_POLICY = replace(OBJECTIVE_PRESETS["default"], policy_weight=0.0)
"""One thought a position has no others to be compared with."""


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
    """Thoughts at places drawn at random.

    They are the same places whenever the texts and the seed are, so that thoughts at two times can be compared; only
    where `positions` is `entropy:K` does the model have a say.

    Args:
        model: The thinking model.
        tokenizer: Of its base.
        tokens: int64 [B, L], a few texts.
        attention_mask: int64 [B, L] or None, as in `quietstar.data.Batch`.
        positions: As in `model.positions`.
        count: At most so many places.
        seed: Of the places and the thoughts.

    Returns:
        One plain JSON object for each place, in an order that has nothing to do with what was thought: `text` and
        `position`, both from 0; `before`, `thought` and `after`, the text around the thought and the thought itself
        (null where `thinking` is `pause`); `reward` (of all lookahead tokens, nats), and of the next token
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
        run_directory: Must exist.
        step: Optimizer steps done.
        samples: From `sample_thoughts`.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(run_directory) / SAMPLES / f"step-{step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"step": step, "samples": list(samples)}, indent=1, allow_nan=False) + "\n")
    return path


def _continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that token ids add to what stands before them: alone, many tokenizers drop their leading space."""
    start, whole = tokenizer_text(tokenizer, before), tokenizer_text(tokenizer, [*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else tokenizer_text(tokenizer, ids)


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
