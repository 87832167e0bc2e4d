"""Streams: every row once per epoch, in an order that depends on the position alone, wherever a run is interrupted."""

from __future__ import annotations

import gc
import gzip
import json
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from quietstar.config.training import DataOptions
from quietstar.data.batches import Batch
from quietstar.data.loading import load_batches
from quietstar.data.shards import find_shards
from quietstar.data.stream import Position, ShuffledRows, StreamedBatches
from quietstar.errors import DataError
from tests.data.shard_files import row_text, write_c4, write_openwebmath

STEPS = 8


def write_shards(directory: Path, sizes: Sequence[int], broken: Sequence[int] = ()) -> list[int]:
    """JSON lines, plain and gzipped by turns, with blank lines; returns the rows that can be used."""
    row, usable = 0, []
    for shard, size in enumerate(sizes):
        lines = []
        for _ in range(size):
            lines.append("{}" if row in broken else json.dumps({"text": row_text(row)}))
            lines += [""] * (row % 4 == 3)
            usable += [] if row in broken else [row]
            row += 1
        content = "".join(line + "\n" for line in lines).encode()
        name = f"part-{shard:02}.jsonl" + (".gz" if shard % 2 else "")
        (directory / name).write_bytes(gzip.compress(content) if shard % 2 else content)
    return usable


def stream(
    path: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int = 2, held_out_texts: int = 0, **values: Any
) -> StreamedBatches:
    options = DataOptions(**({"source": "stream", "path": str(path), "length": 5, "workers": 0} | values))
    batches, _ = load_batches(options, tokenizer, batch_size=batch_size, seed=11, held_out_texts=held_out_texts)
    assert isinstance(batches, StreamedBatches)
    return batches


def plain(batch: Batch) -> tuple[Any, ...]:
    mask = None if batch.attention_mask is None else batch.attention_mask.tolist()
    return batch.tokens.tolist(), mask, list(batch.names)


def rows_in(tokens: torch.Tensor) -> list[int]:
    """Which rows begin in the tokens, in their order."""
    return [token - 2 for token in tokens.flatten().tolist() if token >= 2]


@given(data=st.data())
@settings(max_examples=60)
def test_an_interrupted_run_gets_the_same_batches(data: st.DataObject, word_tokenizer: PreTrainedTokenizerBase) -> None:
    """Against one that was not interrupted, also with bad rows, whatever the number of threads before and after."""
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) > 4))
    broken = data.draw(st.sets(st.integers(1, 20), max_size=2))
    values = {
        "packing": data.draw(st.sampled_from(["joined", "separate", "crop"])),
        "shuffle_rows": data.draw(st.sampled_from([1, 2, 3, 100])),
        "on_bad_row": "skip",
        "length": data.draw(st.integers(2, 9)),
        "batch_size": data.draw(st.integers(1, 4)),
        "held_out_texts": data.draw(st.integers(0, 1)),
    }
    stops = data.draw(st.sets(st.integers(0, STEPS - 1)))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("quietstar.data.rows.SHOWN", 0)
        directory = Path(name)
        write_shards(directory, sizes, sorted(broken))
        expected = []
        batches = stream(directory, word_tokenizer, **values)
        for step in range(STEPS):
            expected.append((plain(batches.batch(step + 1)), batches.skipped, batches.state_dict()))
        found = []
        for step in range(STEPS):
            if step in stops or not step:
                state = json.loads(json.dumps(batches.state_dict())) if step else {}
                batches = stream(directory, word_tokenizer, workers=data.draw(st.integers(0, 3)), **values)
                batches.load_state_dict(state)
            found.append((plain(batches.batch(step + 1)), batches.skipped, batches.state_dict()))
        batches.close()
        assert found == expected


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 2),
    window=st.integers(1, 12),
    packing=st.sampled_from(["joined", "separate", "crop"]),
)
@settings(max_examples=40)
def test_every_row_comes_once_per_epoch(
    sizes: list[int], window: int, packing: str, word_tokenizer: PreTrainedTokenizerBase
) -> None:
    with tempfile.TemporaryDirectory() as name:
        usable = write_shards(Path(name), sizes)
        batches = stream(Path(name), word_tokenizer, packing=packing, shuffle_rows=window, length=6, batch_size=1)
        seen: list[int] = []
        while len(seen) < 3 * len(usable):
            seen += rows_in(batches.batch(1).tokens)
    for epoch in range(3):
        assert sorted(seen[epoch * len(usable) : (epoch + 1) * len(usable)]) == usable


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    window=st.integers(1, 12),
    held_out=st.integers(0, 3),
    place=st.integers(0, 60),
)
@example(sizes=[3], window=2, held_out=0, place=3)
@settings(max_examples=40)
def test_the_order_from_a_position_is_the_rest_of_the_whole(
    sizes: list[int], window: int, held_out: int, place: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), sizes)
        shards = find_shards(name, None)
        kept = sum(sum(1 for _ in shard.rows(held_out, "text", 1_000)) for shard in shards)
        rows = ShuffledRows(shards, "text", 1_000, seed=4, window=window, held_out=[held_out] * len(sizes))
        if not kept:
            with pytest.raises(DataError, match="without any row to train on"):
                next(rows.read(Position()))
            return
        whole = [found for found, _ in zip(rows.read(Position()), range(3 * kept), strict=False)]
        assert [found for found, _ in zip(rows.read(whole[place % kept][0]), range(kept), strict=False)] == (
            whole[place % kept :][:kept]
        )
        if place % kept + 1 < kept:
            assert next(rows.read(whole[place % kept][0].next())) == whole[place % kept + 1]
    for position, row in whole:
        assert row.index // window == position.row // window  # it was shuffled within its window
        assert row.index >= held_out


def test_epochs_seeds_shards_and_windows_have_orders_of_their_own(tmp_path: Path) -> None:
    write_shards(tmp_path, [20, 20])
    orders = []
    for seed in range(3):
        rows = ShuffledRows(find_shards(str(tmp_path), None), "text", 1_000, seed=seed, window=10)
        indices = [row.index % 10 for _, (_, row) in zip(range(200), rows.read(Position()), strict=False)]
        orders += [tuple(indices[first : first + 10]) for first in range(0, 200, 10)]
    assert len(set(orders)) == len(orders)


def test_the_order_of_a_stream_is_the_same_everywhere(tmp_path: Path) -> None:
    """A recorded order: if it changed, a resumed run would silently go on with other rows."""
    write_shards(tmp_path, [3, 3])
    rows = ShuffledRows(find_shards(str(tmp_path), None), "text", 1_000, seed=1234, window=2)
    found = [f"{row.source[-1]}:{row.index}" for _, (_, row) in zip(range(7), rows.read(Position()), strict=False)]
    assert found == ["z:0", "z:1", "z:3", "z:2", "l:0", "l:1", "l:2"]  # part-01.jsonl.gz before part-00.jsonl


def test_a_window_of_one_keeps_the_order(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    usable = write_shards(tmp_path, [4, 5, 3])
    batches = stream(tmp_path, word_tokenizer, shuffle_rows=1, batch_size=30)
    assert rows_in(batches.batch(1).tokens)[:24] == usable * 2


@pytest.mark.parametrize(("source", "write"), [("openwebmath", write_openwebmath), ("c4", write_c4)])
@pytest.mark.parametrize("packing", ["joined", "separate", "crop"])
def test_openwebmath_and_c4_interrupted_and_resumed_give_every_row_once(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase, source: str, write: Any, packing: str
) -> None:
    rows = [list(range(0, 13)), list(range(13, 20)), list(range(20, 31))]
    write(tmp_path, [[row_text(row) for row in shard] for shard in rows])
    values = {"source": source, "packing": packing, "shuffle_rows": 4, "batch_size": 1, "length": 6, "workers": 2}
    seen: list[int] = []
    state: dict[str, Any] = {}
    while len(seen) < 62:
        batches = stream(tmp_path, word_tokenizer, **values)
        batches.load_state_dict(state)
        for step in range(5):
            seen += rows_in(batches.batch(step + 1).tokens)
        state = batches.state_dict()
        batches.close()
    assert sorted(seen[:31]) == sorted(seen[31:62]) == list(range(31))


@given(length=st.integers(1, 9), window=st.integers(1, 5))
@settings(max_examples=20)
def test_separate_numbers_the_documents_of_each_text(
    length: int, window: int, word_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A document ends with `<end>`, so the number of a token is one more than the ends before it in its text."""
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), [6, 5])
        batch = stream(Path(name), word_tokenizer, packing="separate", length=length, shuffle_rows=window, batch_size=9)
        tokens, mask = (batch_ := batch.batch(1)).tokens, batch_.attention_mask
    ends = (tokens == 0).int()
    assert mask is not None
    assert mask.dtype == torch.int64
    assert torch.equal(mask, ends.cumsum(1) - ends + 1)


def test_held_out_rows_are_the_first_and_never_trained_on(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase
) -> None:
    write_shards(tmp_path, [3, 9, 4])
    options = DataOptions(source="stream", path=str(tmp_path), length=4, shuffle_rows=5)
    batches, held_out = load_batches(options, word_tokenizer, batch_size=2, seed=0, held_out_texts=5)
    _, same = load_batches(options, word_tokenizer, batch_size=2, seed=1, held_out_texts=5)
    assert held_out is not None
    assert same is not None
    assert torch.equal(held_out.tokens, same.tokens)  # whatever the seed
    out = rows_in(held_out.tokens)
    assert out == list(range(len(out)))
    assert len(out) > 3  # more than the whole first shard
    seen: list[int] = []
    for step in range(40):
        seen += rows_in(batches.batch(step + 1).tokens)
    assert set(seen) == set(range(len(out), 16))


def test_all_of_a_stream_cannot_be_held_out(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    write_shards(tmp_path, [3])
    with pytest.raises(DataError, match=r"1 shard\(s\) with 3 text\(s\) of 4 tokens, of which 5 would be held out"):
        stream(tmp_path, word_tokenizer, length=4, held_out_texts=5)
    batches = stream(tmp_path, word_tokenizer, length=4, held_out_texts=2)
    with pytest.raises(DataError, match="without any row to train on"):
        batches.batch(1)
    assert len(stream(tmp_path, word_tokenizer, length=4, held_out_texts=5, validation_fraction=0.0).batch(1)) == 2


def test_a_validation_path_is_held_out_instead(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    write_c4(tmp_path, [[row_text(row) for row in range(8)]])
    write_c4(tmp_path, [[row_text(row) for row in range(40, 50)]], split="validation")
    options = DataOptions(
        source="c4", path=str(tmp_path), validation_path=str(tmp_path / "en" / "c4-validation*"), length=4
    )
    batches, held_out = load_batches(options, word_tokenizer, batch_size=20, seed=0, held_out_texts=3)
    assert held_out is not None
    assert len(held_out) == 3
    assert rows_in(held_out.tokens)[0] == 40
    assert set(rows_in(batches.batch(1).tokens)) == set(range(8))
    _, fewer = load_batches(options, word_tokenizer, batch_size=20, seed=0, held_out_texts=100)
    assert fewer is not None
    assert 3 < len(fewer) < 100


def test_too_little_text_is_said_instead_of_reading_for_ever(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase
) -> None:
    write_shards(tmp_path, [2], broken=[1])
    batches = stream(tmp_path, word_tokenizer, length=50, on_bad_row="skip", workers=1)
    with (
        pytest.warns(UserWarning, match="row skipped"),
        pytest.raises(DataError, match=r"less text in all than one training text of 50 tokens needs \(1 rows could"),
    ):
        batches.batch(1)
    (tmp_path / "part-00.jsonl").write_text("\n\n{}\n")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="less text in all"):
        stream(tmp_path, word_tokenizer, on_bad_row="skip").batch(1)
    (tmp_path / "part-00.jsonl").write_text("")
    with pytest.raises(DataError, match=r"part-00\.jsonl: 1 shard\(s\) without any row"):
        stream(tmp_path, word_tokenizer, held_out_texts=0, validation_fraction=0.0).batch(1)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_bad_row_reaches_the_trainer_with_its_line(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase, workers: int
) -> None:
    write_shards(tmp_path, [12], broken=[9])
    batches = stream(tmp_path, word_tokenizer, shuffle_rows=1, workers=workers)
    with pytest.raises(DataError, match=r"part-00\.jsonl:12: has no field 'text'"):  # two blank lines before it
        for step in range(30):
            batches.batch(step + 1)
    (tmp_path / "part-00.jsonl").write_text('{"text": "r1 unheard"}\n')
    with pytest.raises(DataError, match=r"part-00\.jsonl:1: the tokenizer can't encode this text"):
        stream(tmp_path, word_tokenizer, workers=workers).batch(1)


def test_a_bad_row_counts_once_however_many_epochs(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    write_shards(tmp_path, [8], broken=[2, 5])
    batches = stream(tmp_path, word_tokenizer, on_bad_row="skip", max_bad_rows=2, batch_size=8)
    with pytest.warns(UserWarning, match="row skipped") as told:
        for step in range(10):
            batches.batch(step + 1)
    assert batches.state_dict()["epoch"] > 2
    assert batches.skipped == len(told) == 2


def test_a_stream_that_is_dropped_leaves_no_thread(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    write_shards(tmp_path, [20])
    gc.collect()
    before = set(threading.enumerate())
    batches = stream(tmp_path, word_tokenizer, workers=3)
    assert set(threading.enumerate()) == before  # before the first batch there is nothing to read ahead
    batches.batch(1)
    assert len(set(threading.enumerate()) - before) == 3
    batches.close()
    assert set(threading.enumerate()) == before
    batches.batch(2)
    del batches
    gc.collect()
    assert set(threading.enumerate()) == before


def test_a_fingerprint_differs_with_the_data_and_its_order(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    write_shards(tmp_path, [6, 5])
    prints = [
        stream(tmp_path, word_tokenizer).fingerprint(),
        stream(tmp_path, word_tokenizer, length=6).fingerprint(),
        stream(tmp_path, word_tokenizer, packing="separate").fingerprint(),
        stream(tmp_path, word_tokenizer, shuffle_rows=3).fingerprint(),
        stream(tmp_path, word_tokenizer, append_eos=False).fingerprint(),
        stream(tmp_path, word_tokenizer, shards="part-00*").fingerprint(),
        stream(tmp_path, word_tokenizer, held_out_texts=1).fingerprint(),
        stream(tmp_path, byte_tokenizer).fingerprint(),
    ]
    first = tmp_path / "part-00.jsonl"
    content = first.read_text()
    first.write_text(content.replace("r0", "r9"))  # of the same size
    prints.append(stream(tmp_path, word_tokenizer).fingerprint())
    first.write_text(content + "\n")
    prints.append(stream(tmp_path, word_tokenizer).fingerprint())
    assert len({json.dumps(each) for each in prints}) == len(prints)
    first.write_text(content)
    assert stream(tmp_path, word_tokenizer, workers=2).fingerprint() == prints[0]


def test_a_state_of_something_else_is_refused(tmp_path: Path, word_tokenizer: PreTrainedTokenizerBase) -> None:
    write_shards(tmp_path, [6])
    with pytest.raises(DataError, match=r"position of the data: got .*'epoch': -1.*, needs integers epoch, shard, row"):
        stream(tmp_path, word_tokenizer).load_state_dict({"epoch": -1, "shard": 0, "row": 0, "token": 0, "skipped": 0})
