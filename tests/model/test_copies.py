"""What a pass copies: waiting for the device, or moving the text's keys, in every layer would cost time for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quietstar.model.padding import read_padding
from quietstar.model.passes import CachedPass
from quietstar.objective.learning import learn
from quietstar_kernels.attention.torch_backend import _pack_text
from quietstar_kernels.positions import Positions
from tests.model.tiny import make_ids, make_model


@pytest.mark.parametrize("inference", [False, True])
def test_anchors_are_copied_between_host_and_device_once_for_all_layers_and_steps(
    inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mistral")
    ids, mask = make_ids(), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    streams = 6 * model.config.thoughts_per_position
    model.think(ids, mask)  # the probe has run

    copied: list[tuple[int, ...]] = []
    make = Positions.__init__

    def count(self: Positions, tensor: Tensor) -> None:
        copied.append(tuple(tensor.shape))
        make(self, tensor)

    monkeypatch.setattr(Positions, "__init__", count)
    with torch.inference_mode(inference):
        thoughts = model.think(ids, mask, record=not inference)
    assert sorted(copied) == [(2,), (2, streams)]

    if inference:
        return
    copied.clear()
    learn(model, ids, mask, thoughts=thoughts).loss.backward()  # one pass, whose layers are recomputed backwards
    assert sorted(copied) == [(2,)]


def test_the_stored_text_is_laid_out_as_the_kernel_reads_it() -> None:
    model = make_model("mistral")
    ids = make_ids()
    with torch.no_grad():
        cached = CachedPass(model, ids, read_padding(ids, None), record=False)
    assert len(cached._cache.layers) == 2
    for layer in cached._cache.layers.values():
        for stored in (layer.text_key, layer.text_value):
            assert _pack_text(stored, torch.float32).data_ptr() == stored.data_ptr()
