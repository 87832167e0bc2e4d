"""Perturbing one input changes exactly the outputs that the mask allows; padding changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.model.thoughts import Thoughts
from quietstar.objective.learning import learn
from tests.model.tiny import VOCABULARY, gradients, make_ids, make_model

MODELS: dict[tuple[str, int, int], QuietStarForCausalLM] = {}


def cached_model(family: str, thought_length: int, lookahead: int) -> QuietStarForCausalLM:
    key = (family, thought_length, lookahead)
    if key not in MODELS:
        MODELS[key] = make_model(family, dtype=torch.float64, thought_length=thought_length, lookahead=lookahead)
    return MODELS[key]


@dataclass(frozen=True)
class Scene:
    """One text with its streams, and where it is padded."""

    family: str
    thought_length: int
    lookahead: int
    length: int
    anchors: list[int]  # with repetitions
    left: int
    right: int
    seed: int

    @property
    def stream_length(self) -> int:
        return self.thought_length + 1 + self.lookahead

    def attention_mask(self) -> Tensor:
        mask = torch.ones(1, self.length, dtype=torch.int64)
        mask[:, : self.left] = 0
        mask[:, self.length - self.right :] = 0
        return mask

    def reach(self) -> Tensor:
        """bool [N, N]: may the state of node q depend on the input of node k, after two layers?

        Nodes are the text's tokens, then each stream's.
        """
        window = 4 if self.family == "mistral_window" else self.length
        size = self.length + len(self.anchors) * self.stream_length
        sees = torch.zeros(size, size, dtype=torch.bool)
        for q in range(self.length):
            for k in range(self.left, q + 1):
                sees[q, k] = q - k < window
            sees[q, q] = True
        for p, anchor in enumerate(self.anchors):
            first = self.length + p * self.stream_length
            for s in range(self.stream_length):
                for k in range(self.left, anchor + 1):
                    sees[first + s, k] = anchor - k < window
                sees[first + s, first : first + s + 1] = True
        return (sees.double() @ sees.double()) > 0

    def lookahead_nodes(self, position: int) -> list[int]:
        """Nodes whose input is the text token at `position`: itself, and where streams are fed it."""
        nodes = [position]
        for p, anchor in enumerate(self.anchors):
            for ahead in range(1, self.lookahead):
                if min(anchor + ahead, self.length - 1) == position:
                    nodes.append(self.length + p * self.stream_length + self.thought_length + 1 + ahead)
        return nodes


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    length = draw(st.integers(2, 7))
    left = draw(st.integers(0, length - 1))
    return Scene(
        family=draw(st.sampled_from(["mistral", "mistral_window", "gpt2"])),
        thought_length=draw(st.integers(1, 2)),
        lookahead=draw(st.integers(1, 3)),
        length=length,
        anchors=sorted(draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4))),
        left=left,
        right=draw(st.integers(0, length - 1 - left)),
        seed=draw(st.integers(0, 100)),
    )


def states(model: QuietStarForCausalLM, scene: Scene, ids: Tensor, thoughts: Thoughts, reuse: bool) -> Tensor:
    """Final states of all nodes, [N, E]."""
    talk = model.talk(ids, scene.attention_mask(), thoughts, reuse_sampling_pass=reuse)
    return torch.cat([talk.text[0], talk.stream[0].flatten(0, 1)]).detach()


@settings(max_examples=40)
@given(scenes(), st.booleans(), st.integers(1, VOCABULARY - 1))
def test_perturbing_an_input_changes_what_the_mask_allows_and_nothing_else(
    scene: Scene, reuse: bool, shift: int
) -> None:
    """Every text token and every thought token in turn."""
    model = cached_model(scene.family, scene.thought_length, scene.lookahead)
    ids = make_ids(1, scene.length, scene.seed)
    anchor = torch.tensor([scene.anchors])
    thoughts = model.think(
        ids, scene.attention_mask(), anchors=anchor, thoughts_per_position=1, seed=scene.seed, record=reuse
    )
    before, reach = states(model, scene, ids, thoughts, reuse), scene.reach()

    def check(ids: Tensor, tokens: Tensor, inputs: list[int]) -> None:
        after = states(model, scene, ids, replace(thoughts, tokens=tokens), reuse)
        changed = (after - before).abs().amax(-1) > 1e-11
        assert torch.equal(changed, reach[:, inputs].any(-1)), inputs

    for position in range(scene.length):
        other = ids.clone()
        other[0, position] = (other[0, position] + shift) % VOCABULARY
        check(other, thoughts.tokens, scene.lookahead_nodes(position))
    for p in range(len(scene.anchors)):
        for t in range(scene.thought_length):
            other = thoughts.tokens.clone()
            other[0, p, t] = (other[0, p, t] + shift) % VOCABULARY
            check(ids, other, [scene.length + p * scene.stream_length + 1 + t])


def test_perturbing_start_or_end_changes_streams_from_there_on_and_no_text() -> None:
    scene = Scene("mistral", 2, 3, 5, [1, 3], 0, 0, 0)
    model = make_model(dtype=torch.float64)
    ids = make_ids(1, 5)
    thoughts = model.think(ids, anchors=torch.tensor([1, 3]), thoughts_per_position=1)
    before = states(model, scene, ids, thoughts, True)
    for row, first in ((0, 0), (1, scene.thought_length + 1)):
        with torch.no_grad():
            model.thought_embedding.weight[row] += 0.1
        after = states(model, scene, ids, thoughts, True)
        changed = (after - before).abs().amax(-1) > 1e-11
        assert not changed[:5].any()
        streams = changed[5:].view(2, -1)
        assert not streams[:, :first].any() and streams[:, first:].all()
        before = after


@settings(max_examples=25)
@given(
    st.sampled_from(["mistral", "mistral_window", "gpt2", "cohere"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(2, 5),
    st.sampled_from(["default", "paper"]),
)
def test_padding_changes_nothing(family: str, left: int, right: int, length: int, objective: str) -> None:
    """The same text with padding: same losses, same gradients, whatever stands in the padding and thinks there."""
    model = cached_model(family, 2, 3)
    text = make_ids(1, length)
    thoughts = model.think(text, seed=1)
    plain = learn(model, text, thoughts=thoughts, objective=objective)
    model.zero_grad()
    plain.loss.backward()
    wanted = gradients(model)

    padded = make_ids(1, left + length + right, seed=7)
    padded[:, left : left + length] = text
    mask = torch.zeros_like(padded)
    mask[:, left : left + length] = 1
    everywhere = model.think(padded, mask, seed=2)
    tokens = everywhere.tokens.clone()
    mine = slice(2 * left, 2 * (left + length - 1))
    tokens[:, mine] = thoughts.tokens
    step = learn(model, padded, mask, thoughts=replace(everywhere, tokens=tokens, recording=None), objective=objective)
    model.zero_grad()
    step.loss.backward()

    # transformers' RMS norms round to float32, which leaves differences of that size in gradients
    torch.testing.assert_close(step.loss, plain.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(step.base_loss, plain.base_loss, atol=1e-9, rtol=0)
    torch.testing.assert_close(step.talk_loss, plain.talk_loss, atol=1e-9, rtol=0)
    torch.testing.assert_close(step.reward[:, mine], plain.reward, atol=1e-9, rtol=0)
    torch.testing.assert_close(step.talk_nll[:, mine], plain.talk_nll, atol=1e-9, rtol=0)
    outside = torch.ones(step.reward.shape[1], dtype=torch.bool)
    outside[mine] = False
    assert not step.reward[:, outside].any() and not step.target_mask[:, outside].any()
    found = gradients(model)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8, rtol=0)


@pytest.mark.parametrize("family", ["mistral_window", "gpt2"])
def test_padding_changes_no_thought_and_no_prediction(family: str) -> None:
    model = make_model(family, dtype=torch.float64)
    text = make_ids(1, 5)
    plain = model.predict(text, anchors=torch.arange(5))
    for left, right in ((2, 0), (0, 2), (1, 3)):
        padded = torch.nn.functional.pad(text, (left, right), value=11)
        mask = torch.nn.functional.pad(torch.ones_like(text), (left, right))
        there = model.predict(padded, mask, anchors=torch.arange(left, left + 5))
        assert torch.equal(there.thoughts.tokens, plain.thoughts.tokens)
        torch.testing.assert_close(there.talk_logits, plain.talk_logits, atol=1e-9, rtol=0)
        logits = model(padded, mask).logits[:, left : left + 5]
        torch.testing.assert_close(logits, plain.talk_logits, atol=1e-9, rtol=0)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model = make_model(dtype=torch.float64)
    ids = make_ids(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    together = model.predict(ids, mask, anchors=torch.arange(6))
    for row in range(3):
        alone = model.predict(ids[row : row + 1], mask[row : row + 1], anchors=torch.arange(6))
        real = mask[row].bool()
        torch.testing.assert_close(together.talk_logits[row][real], alone.talk_logits[0][real], atol=1e-9, rtol=0)


def test_some_anchors_give_the_same_rows_as_all_anchors() -> None:
    model = make_model(dtype=torch.float64)
    ids = make_ids(2, 7)
    everywhere = model.think(ids, seed=1)
    some = torch.tensor([[1, 4], [0, 5]])
    rows = torch.stack([torch.cat([torch.tensor([2 * a, 2 * a + 1]) for a in row]) for row in some.tolist()])
    tokens = everywhere.tokens.gather(1, rows[..., None].expand(-1, -1, 2))
    chosen = model.think(ids, anchors=some, tokens=tokens)
    torch.testing.assert_close(chosen.logprob, everywhere.logprob.gather(1, rows[..., None].expand(-1, -1, 2)))
    full, part = learn(model, ids, thoughts=everywhere), learn(model, ids, thoughts=chosen)
    torch.testing.assert_close(part.talk_nll, full.talk_nll.gather(1, rows[..., None].expand(-1, -1, 3)))
    torch.testing.assert_close(part.advantage, full.advantage.gather(1, rows))
    assert torch.equal(part.base_nll, full.base_nll)


def test_thoughts_of_one_position_stand_side_by_side() -> None:
    model = make_model(dtype=torch.float64)
    ids = make_ids(1, 5)
    thoughts = model.think(ids, thoughts_per_position=3)
    assert thoughts.anchor[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    same = replace(thoughts, tokens=thoughts.tokens[:, ::3].repeat_interleave(3, 1), recording=None)
    step = learn(model, ids, thoughts=same)
    rewards = step.reward.view(1, -1, 3)
    torch.testing.assert_close(rewards, rewards[..., :1].expand_as(rewards))
    assert float(step.advantage.abs().max()) < 1e-12
