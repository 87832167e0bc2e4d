"""How well a text is predicted with and without thoughts: on average, by difficulty, and by kind of token.

`held_out_nll` is read first: it cuts the text into windows, measures their NLLs, and compares the two sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from quietstar.data.sources import encode
from quietstar.errors import ConfigError, DataError
from quietstar.evaluation.item_store import Record, counted
from quietstar.evaluation.subject import Subject, Writer
from quietstar.evaluation.token_texts import CLASSES, decode, first_tokens, token_classes
from quietstar.statistics.comparison import Comparison, Group
from quietstar.statistics.intervals import Array, Interval, block_intervals

Mask = NDArray[np.bool_]

SOME = 100
"""Number of characters of the text that are encoded to find the tokenizer's first tokens."""

FIELDS = ("off", "on", "entropy")
"""Fields of a window's record."""

MOST_LOGITS = 1 << 28
"""Elements of the logits of a batch, 1 GiB in float32; there are two such tensors."""


DECILES = 10

DIFFICULTY, UNCERTAINTY, KIND = "difficulty", "uncertainty", "kind of token"

CAVEAT = (
    "Tenths of the tokens by their NLL without thinking, the easiest first: they look at the outcome. A change that is "
    "of no use, such as noise or predictions that are only sharper, already moves easy and hard tokens in opposite "
    "ways (regression to the mean), so that no tenth by itself says that thinking helps or hurts there; the mean over "
    "all does, and so do the tenths by uncertainty."
)


@dataclass(frozen=True)
class Window:
    """A part of the text that is predicted separately.

    Args:
        ids: Token ids of the window, after the tokenizer's first tokens.
        given: Number of tokens at the start of `ids` that are not predicted.
    """

    ids: list[int]
    given: int


def held_out_nll(subject: Subject, text: str, name: str) -> list[Comparison]:
    """Measures NLL per token and bits per byte of a text, without thought and after a greedy thought at each position.

    Args:
        subject: Model that is evaluated, with its settings and records.
        text: Content of the text file.
        name: Name of the text file.

    Raises:
        ConfigError: A window does not fit into the context.
        DataError: The text has fewer than two tokens, or the tokenizer cannot encode it.
    """
    settings = subject.settings
    length = settings.length
    if length is None or length > subject.context:
        raise ConfigError(f"length: got {length}, the model's context leaves room for {subject.context}")
    tokenizer = subject.writer.tokenizer
    ids, cut = encode(text, tokenizer, settings.text_tokens, name, settings.special_tokens)
    front = first_tokens(tokenizer, text[:SOME])
    if front and ids[: len(front)] == front:  # a chat's template has put them there
        ids = ids[len(front) :]
    windows = list(text_windows(ids, front, length))
    measured = _nlls(subject, windows)
    found, entropies = [(off, on) for off, on, _ in measured], [entropy for _, _, entropy in measured]
    classes = [token_classes(window.ids, subject.texts)[window.given - 1 :] for window in windows]
    per_token = nll_comparison(found, classes, settings.seed, entropies)
    count = sum(len(off) for off, _ in found)
    beginning = ", from the beginning of the file" if cut else ""
    note = f"{count:,} tokens in {len(windows)} windows of {length}, {settings.length_from}{beginning}"
    statement = (
        f"Mean negative log-likelihood of the next token ({note}, each predicted from those before it in its window); "
        "thinking is a greedy thought before each; lower is better."
    )
    sizes = [_bytes(subject, window) for window in windows]
    base = replace(per_token, of=name, statement=statement)
    return [base, replace(bits_comparison(found, sizes, settings.seed), of=name)]


def text_windows(ids: Sequence[int], front: Sequence[int], length: int) -> Iterator[Window]:
    """Yields consecutive windows of a text; a last window in which nothing would be predicted is left out.

    Args:
        ids: Token ids of the text.
        front: Tokens that the tokenizer begins a text with; where there are any, the first token of a window is
            predicted too.
        length: Number of tokens of a window, including `front`.

    Raises:
        DataError: There is nothing to predict.
    """
    step = length - len(front)
    given = max(1, len(front))
    if step < 1 or length <= given or len(front) + len(ids) <= given:
        raise DataError(
            f"text: {len(ids)} tokens in windows of {length} with {len(front)} in front; needs at least two"
        )
    for first in range(0, len(ids), step):
        window = Window([*front, *ids[first : first + step]], given)
        if len(window.ids) > given:
            yield window


@torch.no_grad()
def _nlls(subject: Subject, windows: Sequence[Window]) -> list[tuple[Array, Array, Array]]:
    """Returns for each window its row of `window_nlls`."""
    vocabulary = subject.writer.model.head.weight.shape[0]
    longest = max(len(window.ids) for window in windows)
    size = max(1, min(subject.settings.batch_size, MOST_LOGITS // (vocabulary * longest)))
    found: dict[int, tuple[Array, Array, Array]] = {}
    waiting: list[tuple[int, str]] = []
    for place, window in enumerate(windows):
        key = subject.key("nll", FIELDS, window.ids, window.given)
        record = subject.store.get(key)
        if record is None:
            waiting.append((place, key))
        else:
            found[place] = _read(record)
    with counted("held-out text, windows", len(waiting)) as count:
        while waiting:
            length = len(windows[waiting[0][0]].ids)
            batch = [one for one in waiting[:size] if len(windows[one[0]].ids) == length]
            del waiting[: len(batch)]
            three = window_nlls(subject.writer, [windows[place] for place, _ in batch])
            for (place, key), *own in zip(batch, *three, strict=True):
                values = [[round(value, 5) for value in one.tolist()] for one in own]
                record = {"metric": "nll", "id": str(place), **dict(zip(FIELDS, values, strict=True))}
                subject.store.add(key, record)
                found[place] = _read(record)
            count(len(batch))
    return [found[place] for place in range(len(windows))]


def _read(record: Record) -> tuple[Array, Array, Array]:
    off, on, entropy = (np.array(record[name]) for name in FIELDS)
    return off, on, entropy


def window_nlls(writer: Writer, windows: Sequence[Window]) -> tuple[Array, Array, Array]:
    """Returns NLLs of windows of one length without and with thought, and the entropies of the predictions without.

    Both NLLs are of distributions that sum to one, also where the paper's mixture of log-probabilities does not.

    Returns:
        Three times float64 [windows, predicted tokens], in nats.
    """
    device = writer.model.head.weight.device
    ids = torch.tensor([window.ids for window in windows], device=device)
    given = windows[0].given
    anchors = torch.arange(given - 1, ids.shape[1] - 1, device=device)
    prediction = writer.model.predict(ids, anchors=anchors)
    sides = []
    for logits in (prediction.base_logits, prediction.talk_logits):
        target = ids[:, given:].flatten()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target, reduction="none")
        sides.append(nll.view(len(windows), -1).double().cpu().numpy())
    # one window at a time: the probabilities of all would take as much memory as the logits
    entropies = torch.stack(
        [torch.special.entr(logits.float().softmax(-1)).sum(-1) for logits in prediction.base_logits]
    )
    return sides[0], sides[1], entropies.double().cpu().numpy()


def _bytes(subject: Subject, window: Window) -> int:
    """Returns the number of bytes of the predicted tokens, at least 1."""
    tokenizer = subject.writer.tokenizer
    before = decode(tokenizer, window.ids[: window.given])
    return max(1, len(decode(tokenizer, window.ids).encode()) - len(before.encode()))


def nll_comparison(
    found: Sequence[tuple[Array, Array]],
    classes: Sequence[Sequence[str]],
    seed: int,
    entropies: Sequence[Array] | None = None,
) -> Comparison:
    """Compares the NLL per token, over all tokens and over parts of them; the bootstrap draws whole windows.

    The parts are tenths by the NLL without thought, tenths by the entropy of that prediction, which does not depend on
    the token that came, and kinds of token.

    Args:
        found: NLLs of each window without and with thought, float64 [predicted tokens] in nats.
        classes: Classes of the predicted tokens of each window.
        seed: Seed of the bootstrap draws.
        entropies: Entropies of each window's predictions without thought in nats; None for no parts by entropy.

    Returns:
        The comparison without `of` and `statement`, which the caller adds.
    """
    parts = [(DIFFICULTY, *part) for part in _tenths([off for off, _ in found])]
    parts += [(UNCERTAINTY, *part) for part in _tenths(entropies or [])]
    parts += [(KIND, kind, [np.array(own) == kind for own in classes]) for kind in CLASSES]
    everything = [np.ones(len(off), dtype=bool) for off, _ in found]
    masks = [np.stack(window) for window in zip(everything, *(mask for _, _, mask in parts), strict=True)]
    counts = np.stack([mask.sum(1) for mask in masks]).astype(np.float64)
    off = np.stack([mask @ side for mask, (side, _) in zip(masks, found, strict=True)])
    on = np.stack([mask @ side for mask, (_, side) in zip(masks, found, strict=True)])
    columns = [block_intervals(values, counts, seed=seed) for values in (off, on, on - off)]
    groups: dict[str, list[Group]] = {}
    for place, (kind, name, _) in enumerate(parts, start=1):
        three = [column[place] for column in columns]
        if all(three):
            groups.setdefault(kind, []).append(Group(name, int(counts[:, place].sum()), *_intervals(three)))
    return Comparison(
        "NLL",
        "",
        "",
        "nats",
        int(counts[:, 0].sum()),
        0,
        *_intervals([column[0] for column in columns]),
        higher_is_better=False,
        resampled="windows",
        groups=groups,
        caveats={DIFFICULTY: CAVEAT},
    )


def _tenths(values: Sequence[Array]) -> list[tuple[str, list[Mask]]]:
    """Returns the name of each tenth, and which tokens of each window are in it."""
    if not values:
        return []
    edges = np.cumsum([len(own) for own in values])[:-1]
    ranked = np.split(deciles(np.concatenate(values)), edges)
    return [(f"tenth {place + 1}", [own == place for own in ranked]) for place in range(DECILES)]


def deciles(values: Array) -> NDArray[np.int64]:
    """Returns which tenth each number is in, 0 for the smallest; ties by position.

    Args:
        values: [n], numbers to rank.
    """
    order = np.argsort(values, kind="stable")
    tenth = np.empty(len(order), dtype=np.int64)
    tenth[order] = np.arange(len(order)) * DECILES // len(order)
    return tenth


def bits_comparison(found: Sequence[tuple[Array, Array]], sizes: Sequence[int], seed: int) -> Comparison:
    """Compares bits per byte; the bootstrap draws whole windows.

    Args:
        found: NLLs of each window without and with thought, float64 [predicted tokens] in nats.
        sizes: Number of bytes of each window's predicted tokens.
        seed: Seed of the bootstrap draws.
    """
    counts = np.array(sizes, dtype=np.float64)[:, None]
    off = np.array([[side.sum() / math.log(2)] for side, _ in found])
    on = np.array([[side.sum() / math.log(2)] for _, side in found])
    three = [block_intervals(values, counts, seed=seed)[0] for values in (off, on, on - off)]
    total = int(counts.sum())
    return Comparison(
        "bits per byte",
        "",
        f"The same in bits for each of the {total:,} bytes of the text in UTF-8, so that tokenizers can be compared.",
        "bits",
        total,
        0,
        *_intervals(three),
        higher_is_better=False,
        resampled="windows",
    )


def _intervals(found: Sequence[Interval | None]) -> tuple[Interval, Interval, Interval]:
    off, on, difference = (one for one in found if one is not None)
    return off, on, difference
