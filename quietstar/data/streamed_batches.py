"""Batches from a stream: what a trainer reads when the text does not fit in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from quietstar.data.bad_rows import BadRows
from quietstar.data.batches import Batch
from quietstar.data.packing import PackedTexts
from quietstar.data.stream import Position
from quietstar.data.text_stream import Text, TextStream
from quietstar.errors import DataError


class StreamedBatches:
    """The texts of a stream in its order. The state is a few integers and says what was handed out, not what was read.

    Args:
        texts: The stream.
        batch_size: Texts per optimizer step.
        bad_rows: Those of the stream.
        fingerprint: Plain JSON values that differ where the texts, or their order, differ.
    """

    def __init__(self, texts: TextStream, batch_size: int, bad_rows: BadRows, fingerprint: Mapping[str, Any]) -> None:
        self._texts = texts
        self._batch_size = batch_size
        self._bad_rows = bad_rows
        self._fingerprint = dict(fingerprint)
        self._start = self.state_dict()

    @property
    def skipped(self) -> int:
        """Rows that could not be used, those of earlier parts of a resumed run included."""
        return self._bad_rows.count

    def batch(self, step: int) -> Batch:
        """The next texts; `step`, counted from 1, only has to be the one after the last one asked for."""
        texts = [self._texts.next() for _ in range(self._batch_size)]
        packed = stack(texts)
        return Batch(packed.tokens, packed.attention_mask, [text.name for text in texts])

    def fingerprint(self) -> dict[str, Any]:
        """What the stream is made of."""
        return dict(self._fingerprint)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, shard and row that the next text begins in, its tokens already taken, and the rows skipped so far."""
        position = self._texts.position
        return {
            "epoch": position.epoch,
            "shard": position.shard,
            "row": position.row,
            "token": self._texts.token,
            "skipped": self._bad_rows.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; an empty state is the beginning.

        Raises:
            DataError: It is not the state of a stream.
        """
        state = state or self._start
        names = ("epoch", "shard", "row", "token", "skipped")
        numbers = [state[name] for name in names if isinstance(state.get(name), int) and state[name] >= 0]
        if len(numbers) < len(names):
            raise DataError(f"position of the data: got {dict(state)}, needs integers {', '.join(names)}")
        epoch, shard, row, token, skipped = numbers
        self._texts.seek(Position(epoch, shard, row), token)
        self._bad_rows.count = skipped

    def close(self) -> None:
        """Ends the threads; the next batch starts them again."""
        self._texts.close()


def stack(texts: list[Text]) -> PackedTexts:
    """Texts as tensors."""
    masks = [text.attention_mask for text in texts if text.attention_mask is not None]
    return PackedTexts(
        torch.from_numpy(np.stack([text.tokens for text in texts])),
        torch.from_numpy(np.stack(masks)) if masks else None,
    )
