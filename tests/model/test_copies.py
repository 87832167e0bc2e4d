"""What a pass copies: waiting for the device, or moving the text's keys, in every layer would cost time for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar.model.padding import read_padding
from quietstar.model.passes import CachedPass
from quietstar_kernels.thought_attention.torch_backend import _pack_text
from tests.model.tiny import make_ids, make_model


class HostCopies:
    """Plays a device: `Tensor.cpu` makes a real copy, and reading any other int32 tensor is one too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.on_host: list[Tensor] = []
        tolist = Tensor.tolist

        def cpu(tensor: Tensor) -> Tensor:
            if tensor.dtype != torch.int32 or self._is_on_host(tensor):
                return tensor
            self.shapes.append(tuple(tensor.shape))
            self.on_host.append(tensor.clone())
            return self.on_host[-1]

        def read(tensor: Tensor) -> Any:
            return tolist(cpu(tensor))

        monkeypatch.setattr(Tensor, "cpu", cpu)
        monkeypatch.setattr(Tensor, "tolist", read)

    def _is_on_host(self, tensor: Tensor) -> bool:
        return any(tensor.data_ptr() == copy.data_ptr() for copy in self.on_host)


def test_anchors_are_copied_to_the_host_once_for_all_layers_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mistral")
    ids, mask = make_ids(), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    streams = 6 * model.config.thoughts_per_position
    model.think(ids, mask)  # the probe has run

    copies = HostCopies(monkeypatch)
    thoughts = model.think(ids, mask, record=True)
    assert copies.shapes.count((2, streams)) == 1
    passes = model.config.thought_length + 1
    assert copies.shapes.count((2,)) <= passes

    copies.shapes.clear()
    model.learn(ids, mask, thoughts=thoughts).loss.backward()  # one pass, whose layers are recomputed backwards
    assert copies.shapes.count((2, streams)) == 1
    assert copies.shapes.count((2,)) == 1


def test_the_stored_text_is_laid_out_as_the_kernel_reads_it() -> None:
    model = make_model("mistral")
    ids = make_ids()
    with torch.no_grad():
        cached = CachedPass(model, ids, read_padding(ids, None), record=False)
    assert len(cached._cache.layers) == 2
    for layer in cached._cache.layers.values():
        for stored in (layer.text_key, layer.text_value):
            assert _pack_text(stored, torch.float32).data_ptr() == stored.data_ptr()
