"""The model as any evaluator calls it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from quietstar.errors import ConfigError, DataError
from quietstar.objective.learning import learn
from tests.model.tiny import make_ids, make_model

IDS = make_ids(2, 6)


def test_logits_are_the_mixed_predictions_of_greedy_thoughts() -> None:
    model = make_model()
    output = model(IDS)
    assert output.logits.shape == (2, 6, 40) and output.logits.dtype == torch.float32
    assert not output.logits.requires_grad and output.loss is None
    assert torch.equal(model(IDS).logits, output.logits)
    wanted = model.predict(IDS, anchors=torch.arange(6)).talk_logits
    assert torch.equal(output.logits, wanted)
    base = model.predict(IDS, anchors=torch.arange(6)).base_logits
    assert (output.logits - base).abs().max() > 0.01


def test_logits_do_not_see_what_follows() -> None:
    """An evaluator scores every token of a text in one call; a thought must not have read the token it predicts."""
    model = make_model(dtype=torch.float64)
    whole = model(IDS).logits
    for length in range(1, 6):
        torch.testing.assert_close(model(IDS[:, :length]).logits, whole[:, :length], atol=1e-9, rtol=0)


def test_labels_give_the_shifted_mean_nll() -> None:
    model = make_model()
    labels = IDS.clone()
    labels[0, :3] = -100
    output = model(IDS, labels=labels)
    logprobs = output.logits[:, :-1].log_softmax(-1)
    terms = [-logprobs[b, i, IDS[b, i + 1]] for b in range(2) for i in range(5) if labels[b, i + 1] != -100]
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    assert len(terms) == 8


def test_logits_to_keep() -> None:
    model = make_model()
    whole = model(IDS).logits
    for kept in (1, 4, 6, 99):
        torch.testing.assert_close(model(IDS, logits_to_keep=kept).logits, whole[:, -kept:], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="logits_to_keep: got 2 together with labels"):
        model(IDS, labels=IDS, logits_to_keep=2)


def test_right_padding_without_a_mask_leaves_earlier_logits_alone() -> None:
    """lm-eval pads on the right and passes no mask."""
    model = make_model()
    padded = torch.nn.functional.pad(IDS, (0, 3), value=2)
    torch.testing.assert_close(model(padded).logits[:, :6], model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_generate_thinks_before_every_token() -> None:
    model = make_model()
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    ids = IDS
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_generate_with_left_padding_equals_the_text_alone() -> None:
    model = make_model()
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(IDS[:1, 2:], **options)[0, -3:]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    together = model.generate(IDS, attention_mask=mask, **options)
    assert together[0, -3:].tolist() == alone.tolist()


def test_generate_never_says_a_banned_token() -> None:
    """START and END may have ids of their own, as in the authors' checkpoints."""
    free = make_model().generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 6:]
    banned = sorted(set(free.flatten().tolist()) - set(IDS.flatten().tolist()))
    assert banned
    model = make_model(banned_token_ids=banned)
    said = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 6:]
    assert not torch.isin(said, torch.tensor(banned)).any()


def test_the_temperature_of_thoughts_is_not_that_of_speech() -> None:
    model = make_model(temperature=0.5)
    assert model.generation_config.temperature != 0.5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]), "row 0 has a gap"),
        (torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]), "row 1 masks every token"),
        (torch.tensor([[1] * 6, [0, 2, 2, 1, 1, 3]]), "row 1 returns to an earlier document"),
        (torch.tensor([[1] * 6, [1, 1, 1, 0, 2, 2]]), "row 1 has a gap"),
        (torch.tensor([[1] * 6, [-1, 1, 1, 1, 2, 2]]), "row 1 has a number that is no document's; needs 0 for padding"),
        (torch.tensor([[0.5] * 6, [1.0] * 6]), "row 0 has a number that is no document's"),
        (torch.ones(2, 5), r"attention_mask: got shape \[2, 5\], needs that of input_ids, \[2, 6\]"),
        (torch.ones(2, 1, 6, 6), r"attention_mask: got shape \[2, 1, 6, 6\]"),
    ],
)
def test_masks_that_are_refused(mask: torch.Tensor, message: str) -> None:
    model = make_model()
    for call in (model, model.think, partial(learn, model), model.predict):
        with pytest.raises(DataError, match=message):
            call(IDS, mask)


@pytest.mark.parametrize("ids", [IDS[0], IDS[:, :0], IDS[:0], IDS[None]])
def test_texts_of_a_wrong_shape(ids: torch.Tensor) -> None:
    model = make_model()
    for call in (model, model.think, partial(learn, model), model.predict):
        with pytest.raises(DataError, match="input_ids: got "):
            call(ids)
