"""Several documents in one row: each thinks, predicts and learns as if it were a row of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar import QuietStarForCausalLM, Thoughts
from quietstar.objective.learning import LearnOutput, learn
from tests.model.tiny import VOCABULARY, assert_same_gradients, gradients, make_ids, make_model

COUNT = 2
EXACT = 1e-9


@dataclass(frozen=True)
class Packed:
    """Documents one after another in rows, and each in a row of its own, padded on the right.

    Args:
        ids, numbers: [B, L], the rows and the documents' numbers in them.
        apart, mask: [N, M], the N documents, the longest of M tokens.
        places: row and first token of each document in `ids`.
    """

    ids: Tensor
    numbers: Tensor
    apart: Tensor
    mask: Tensor
    places: list[tuple[int, int]]

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def streams(self, document: int, targets: int = 1) -> tuple[slice, slice]:
        """Streams of the document's tokens, all but the last, in its row and alone."""
        first, count = self.places[document][1], self.lengths[document] - targets
        return slice(COUNT * first, COUNT * (first + count)), slice(0, COUNT * count)


def pack(rows: list[list[int]]) -> Packed:
    """Rows of random documents of the given lengths; a negative length is padding."""
    length, documents = sum(map(abs, rows[0])), [size for row in rows for size in row if size > 0]
    ids, numbers = make_ids(len(rows), length), torch.zeros(len(rows), length, dtype=torch.int64)
    apart, mask = make_ids(len(documents), max(documents), seed=1), torch.zeros(len(documents), max(documents)).long()
    places: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        first = 0
        for number, size in enumerate(row, 1):
            if size > 0:
                mask[len(places), :size] = 1
                numbers[index, first : first + size] = number
                ids[index, first : first + size] = apart[len(places), :size]
                places.append((index, first))
            first += abs(size)
        assert first == length
    return Packed(ids, numbers, apart, mask, places)


UNEVEN = pack([[-1, 4, 1, 6, -2], [2, 7, 5], [-3, 11]])
EVEN = pack([[6, 6], [6, 6]])


def same_thoughts(model: QuietStarForCausalLM, packed: Packed) -> tuple[Thoughts, Thoughts]:
    """Thoughts of the documents alone, and of the rows, where the same tokens are thought."""
    alone = model.think(packed.apart, packed.mask, seed=3)
    tokens = model.think(packed.ids, packed.numbers, seed=4).tokens.clone()
    for document, (row, _) in enumerate(packed.places):
        here, there = packed.streams(document)
        tokens[row, here] = alone.tokens[document, there]
    return alone, model.think(packed.ids, packed.numbers, tokens=tokens)


def learn_both(
    model: QuietStarForCausalLM, packed: Packed, **options: Any
) -> list[tuple[LearnOutput, dict[str, Tensor]]]:
    """A step and its gradients: of the documents alone, and of the rows."""
    found = []
    batches = ((packed.apart, packed.mask), (packed.ids, packed.numbers))
    for (ids, mask), thoughts in zip(batches, same_thoughts(model, packed), strict=True):
        model.zero_grad()
        step = learn(model, ids, mask, thoughts=thoughts, **options)
        step.loss.backward()
        found.append((step, gradients(model)))
    return found


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize(
    ("family", "packed", "options"),
    [
        ("mistral_window", UNEVEN, {}),
        ("llama", UNEVEN, {"objective": "paper", "reuse_sampling_pass": False}),
        ("gemma2", UNEVEN, {}),
        ("gpt2", EVEN, {"objective": "authors"}),
    ],
    ids=["mistral_window", "llama", "gemma2", "gpt2"],
)
def test_a_step_is_that_of_the_documents_alone(family: str, packed: Packed, options: dict[str, Any]) -> None:
    """Losses, rewards and every gradient, whatever stands and thinks in the padding and at the ends of documents."""
    model = make_model(family, dtype=torch.float64, thoughts_per_position=COUNT)
    (alone, wanted), (step, found) = learn_both(model, packed, **options)
    for name in ("loss", "base_loss", "talk_loss", "policy_loss"):
        torch.testing.assert_close(getattr(step, name), getattr(alone, name), atol=EXACT, rtol=EXACT)
    counted = torch.zeros_like(step.reward, dtype=torch.bool)
    for document, (row, first) in enumerate(packed.places):
        here, there = packed.streams(document)
        counted[row, here] = True
        assert torch.equal(step.target_mask[row, here], alone.target_mask[document, there])
        for name in ("reward", "advantage", "talk_nll", "base_nll_at_target", "thought_logprob"):
            left, right = getattr(step, name)[row, here], getattr(alone, name)[document, there]
            torch.testing.assert_close(left, right, atol=EXACT, rtol=EXACT)
        end = packed.lengths[document] - 1
        torch.testing.assert_close(
            step.base_nll[row, first : first + end], alone.base_nll[document, :end], atol=EXACT, rtol=EXACT
        )
    assert not step.target_mask[~counted].any() and not step.reward[~counted].any()
    assert int((step.base_nll != 0).sum()) == sum(packed.lengths) - len(packed.places)
    assert_same_gradients(found, wanted, EXACT)


@pytest.mark.parametrize("family", ["mistral_window", "qwen2_window"])
def test_predictions_are_those_of_the_documents_alone(family: str) -> None:
    """Greedy thoughts, at every token and so at the last of each document too."""
    model = make_model(family, dtype=torch.float64)
    together = model(UNEVEN.ids, UNEVEN.numbers).logits
    alone = model(UNEVEN.apart, UNEVEN.mask).logits
    for document, (row, first) in enumerate(UNEVEN.places):
        length = UNEVEN.lengths[document]
        torch.testing.assert_close(
            together[row, first : first + length], alone[document, :length], atol=EXACT, rtol=EXACT
        )


@pytest.mark.parametrize("reuse", [False, True])
def test_nothing_of_another_document_is_seen(reuse: bool) -> None:
    """Not even where it changes no loss: the states of text and of whole streams are the same to the last bit."""
    model = make_model("mistral", dtype=torch.float64, thoughts_per_position=1)
    ids, numbers = make_ids(1, 9), torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3]])
    anchors = torch.arange(9)
    thoughts = model.think(ids, numbers, anchors=anchors, seed=1)

    def states(ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = model.talk(ids, numbers, replace(thoughts, tokens=tokens), reuse_sampling_pass=reuse)
        return found.text[0].detach(), found.stream[0].detach()

    text, stream = states(ids, thoughts.tokens)
    for document in (1, 2, 3):
        inside = numbers[0] == document
        other, tokens = ids.clone(), thoughts.tokens.clone()
        other[0, inside] = (other[0, inside] + 1) % VOCABULARY
        tokens[0, inside] = (tokens[0, inside] + 1) % VOCABULARY
        text_there, stream_there = states(other, tokens)
        assert torch.equal(text_there[~inside], text[~inside]) and torch.equal(stream_there[~inside], stream[~inside])
        assert (text_there != text)[inside].any(-1).all() and (stream_there != stream)[inside].any(-1).all()


def test_a_row_of_one_document_is_a_row_whatever_its_number() -> None:
    model = make_model("mistral_window")
    ids = make_ids(2, 7)
    for mask in (torch.ones_like(ids), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])):
        first, second = (learn(model, ids, numbers, seed=2) for numbers in (mask, mask * 5))
        assert torch.equal(first.loss, second.loss)
        assert torch.equal(first.thoughts.tokens, second.thoughts.tokens)
        assert torch.equal(first.talk_nll, second.talk_nll)


def test_the_other_texts_of_a_batch_do_not_change_what_a_text_thinks() -> None:
    """Cut into micro-batches, a step thinks the same: also where one has documents and padding and the other not."""
    model = make_model(dtype=torch.float64)
    ids = make_ids(3, 9)
    numbers = torch.tensor([[1, 1, 2, 2, 2, 3, 3, 3, 3], [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    for anchors in (None, "every:2", "entropy:3"):
        whole = model.think(ids, numbers, anchors=anchors, seed=1)
        for row in range(3):
            place = {"first_text": row, "texts_in_step": 3}
            part = model.think(ids[row, None], numbers[row, None], anchors=anchors, seed=1, **place)
            assert torch.equal(part.anchor[0], whole.anchor[row])
            assert torch.equal(part.tokens[0], whole.tokens[row])


def test_under_inference_mode() -> None:
    model = make_model("mistral_window")
    wanted = model.think(UNEVEN.ids, UNEVEN.numbers, seed=1)
    with torch.inference_mode():
        found = model.think(UNEVEN.ids, UNEVEN.numbers, seed=1)
    assert torch.equal(found.tokens, wanted.tokens)
