"""The parallel step equals one that runs every stream by itself through a plain transformers model."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from quietstar.config.training import Replay
from quietstar.objective.learning import learn
from tests.model.naive import NaiveThinker, layer_windows
from tests.model.tiny import FAMILIES, NORM_BEHIND, assert_same_gradients, gradients, make_ids, make_model

TOLERANCE = 1e-9


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_step_equals_one_stream_at_a_time(family: str) -> None:
    model = make_model(family, dtype=torch.float64)
    ids = make_ids(batch=2, length=7)
    thoughts = model.think(ids, seed=1)
    naive = NaiveThinker(model)
    expected = naive.step(ids, thoughts.tokens, thoughts.anchor, model.config.lookahead, count=2)

    prediction = model.predict(ids, thoughts=thoughts)
    wanted_base = torch.stack([expected.base_logits[b, thoughts.anchor[b].long()] for b in range(2)])
    torch.testing.assert_close(prediction.base_logits, wanted_base, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(prediction.talk_logits, expected.talk_logits[:, :, 0], atol=TOLERANCE, rtol=0)

    stages = [stage for stage in get_args(Replay) if stage != "down" or family not in NORM_BEHIND]
    for options in ({"reuse_sampling_pass": False}, *({"replay": stage} for stage in stages)):
        model.zero_grad()
        step = learn(model, ids, thoughts=thoughts, **options)
        step.loss.backward()
        torch.testing.assert_close(step.talk_nll, expected.talk_nll, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(step.loss.detach(), expected.loss, atol=TOLERANCE, rtol=0)
        assert_same_gradients(gradients(model), expected.gradients, TOLERANCE)


def test_windows_are_in_play() -> None:
    """The window families would pass the test above with no window at all if their layers ignored it."""
    assert layer_windows(make_model("mistral_window").base) == [4, 4]
    assert layer_windows(make_model("qwen2_window").base) == [None, 4]
