"""What a run's numbers are by definition: from the lines of its store, and from plain transformers models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.outer_loop.loops import judged

Line = dict[str, Any]


def accepted(text: str) -> str:
    """A completion up to its answer."""
    found = re.match(r".*?>\d+\.", text)
    return text if found is None else found[0]


def answer(text: str) -> str | None:
    """The result that a completion comes to."""
    found = re.search(r">(\d+)\.", text)
    return None if found is None else found[1]


def is_right(line: Line) -> bool:
    """Whether a sample's text has the sum of its problem."""
    return answer(line["text"]) == str(sum(map(int, line["problem"].split("+"))))


def lines_of(run: Path, iteration: int, purpose: str) -> list[Line]:
    """The samples of a phase with their last verdicts."""
    return [line for line in judged(run) if (line["iteration"], line["purpose"]) == (iteration, purpose)]


def by_problem(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Samples of each problem, by their index."""
    found: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda one: one["index"]):
        found.setdefault(line["problem"], []).append(line)
    return found


def accuracy(lines: Iterable[Line]) -> float:
    """Mean over problems of the share of right samples."""
    return float(np.mean([np.mean([is_right(line) for line in own]) for own in by_problem(lines).values()]))


@lru_cache(maxsize=4)
def plain(directory: Path) -> tuple[LlamaForCausalLM, Any]:
    """A model directory as transformers reads it, in float64."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64), AutoTokenizer.from_pretrained(directory)


def ids_of(directory: Path, prompt: str, completion: str, ended: bool) -> tuple[torch.Tensor, int]:
    """Token ids [1, L] of both, and how many are the prompt's."""
    tokenizer = plain(directory)[1]
    start, rest = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    return torch.tensor([[*start, *rest, *([tokenizer.eos_token_id] if ended else [])]]), len(start)


@torch.no_grad()
def token_logprobs(directory: Path, prompt: str, completion: str, ended: bool = True) -> torch.Tensor:
    """Log-probability of each token of a completion, its end included."""
    ids, start = ids_of(directory, prompt, completion, ended)
    logprob = plain(directory)[0](input_ids=ids).logits.log_softmax(-1)
    return logprob[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :, 0]


@torch.no_grad()
def greedy(directory: Path, prompt: str, tokens: int) -> str:
    """What transformers' own `generate` writes."""
    model, tokenizer = plain(directory)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def mean_of_subsets(count: int, k: int, chosen: Callable[[Sequence[int]], float]) -> float:
    """Mean over all k of `count` candidates."""
    return float(np.mean([chosen(subset) for subset in combinations(range(count), k)]))


def best_right(scores: Sequence[float], right: Sequence[bool], subset: Sequence[int]) -> float:
    """Whether the best scored of a subset is right; the mean where several are best."""
    best = max(scores[i] for i in subset)
    return float(np.mean([right[i] for i in subset if scores[i] == best]))


def vote_right(
    answers: Sequence[str | None], weights: Sequence[float], right: Sequence[bool], subset: Sequence[int]
) -> float:
    """Whether the answer with the most votes of a subset is right; the mean where several have the most."""
    votes: dict[str, float] = {}
    for i in subset:
        if (said := answers[i]) is not None:
            votes[said] = votes.get(said, 0.0) + weights[i]
    leading = [said for said, sum_ in votes.items() if sum_ >= max(votes.values()) * (1 - 1e-12)]
    return float(np.mean([right[answers.index(said)] for said in leading])) if leading else 0.0
