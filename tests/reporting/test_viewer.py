"""The viewer's numbers are those of the model, and its files say what they are made of."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.config.objective import resolve_objective
from quietstar.data.sources import encode, read_text
from quietstar.data.tokenizer import pieces, vocabulary
from quietstar.errors import ConfigError, DataError
from quietstar.inference import viewed_thoughts
from quietstar.inference.viewed_thoughts import overlap, thoughts_of, window_size, windows, write_view
from quietstar.model.thoughts import Thoughts
from quietstar.objective.learning import learn
from quietstar.reporting.viewer import ViewOptions
from tests.reporting.view_models import HOSTILE, WORDS, of_characters, of_words

SUMS = "2+6+4+3=1\n0+5+1+3=2\n6+6+0+1=6\n3+3+1+0=0\n"
ROUNDED = 6e-5
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "log_probs": {"interpolation": "log_probs"},
    "pause": {"thinking": "pause"},
}


def same_thoughts(content: dict[str, Any], anchors: list[int], shift: int = 0) -> Thoughts:
    """The thoughts of a file at some positions, to be given to the model."""
    at = {position["token"] - 1: position["thoughts"] for position in content["positions"]}
    length, count = content["model"]["thought_length"], content["settings"]["thoughts"]
    tokens = torch.tensor([[thought["tokens"] or [-1] * length for place in anchors for thought in at[place]]])
    anchor = torch.tensor([anchors], dtype=torch.int32).repeat_interleave(count, 1) - shift
    return Thoughts(tokens, anchor, torch.zeros(tokens.shape), count)


def check_against_the_model(
    model: QuietStarForCausalLM, content: dict[str, Any], ids: Tensor, anchors: list[int], shift: int = 0
) -> None:
    """Compares the positions with what `learn` and `predict` give for a text that holds them."""
    thoughts = same_thoughts(content, anchors, shift)
    objective = resolve_objective("default", policy_weight=0.0)
    with torch.no_grad():
        output = learn(model, ids, thoughts=thoughts, objective=objective, reuse_sampling_pass=False)
        plain = model.base(ids).logits[0].log_softmax(-1)
    prediction = model.predict(ids, thoughts=thoughts)
    at = {position["token"] - 1: position for position in content["positions"]}
    count = content["settings"]["thoughts"]
    for place, anchor in enumerate(anchors):
        position, streams = at[anchor], slice(place * count, (place + 1) * count)
        ahead = len(position["base"])
        assert ahead == int(output.target_mask[0, place * count].sum())
        wanted = [float(plain[anchor - shift + j, ids[0, anchor - shift + 1 + j]]) for j in range(ahead)]
        assert position["base"] == pytest.approx(wanted, abs=1e-3)
        reward = output.reward[0, streams]
        for k, thought in enumerate(position["thoughts"]):
            assert thought["talk"] == pytest.approx((-output.talk_nll[0, streams][k, :ahead]).tolist(), abs=ROUNDED)
            assert thought["reward"] == pytest.approx(float(reward[k]), abs=ROUNDED)
            if count > 1:
                assert thought["advantage"] == pytest.approx(float(reward[k] - reward.mean()), abs=ROUNDED)
            assert thought["weight"] == pytest.approx(float(prediction.mixing_weight[0, streams][k]), abs=ROUNDED)
            talk = prediction.talk_logits[0, streams][k]
            talk = talk if model.config.interpolation == "log_probs" else talk.log_softmax(-1)
            assert_most_probable(thought["after"], talk.exp())
            # the same prediction, seen from its loss
            assert thought["talk"][0] == pytest.approx(float(talk[ids[0, anchor - shift + 1]]), abs=1e-3)
        assert_most_probable(position["before"], prediction.base_logits[0, place * count].softmax(-1))


def assert_most_probable(listed: list[list[Any]], probability: Tensor) -> None:
    values = probability.topk(len(listed)).values.tolist()
    assert [share for _, share in listed] == pytest.approx(values, rel=1e-2)
    assert [float(probability[token]) for token, _ in listed] == pytest.approx(values, rel=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_those_of_learn_and_predict(variant: str) -> None:
    model, tokenizer = of_characters(**VARIANTS[variant])
    content = thoughts_of(model, tokenizer, SUMS, ViewOptions(top_k=3, seed=4))
    ids = torch.tensor([content["text"]["tokens"]])
    assert content["text"] == {"name": "text", "cut": False, "tokens": ids[0].tolist(), "pieces": {}}
    assert [position["token"] for position in content["positions"]] == list(range(1, len(SUMS)))
    assert content["settings"]["thoughts"] == (1 if variant == "pause" else 2)
    assert ("mean" in content["positions"][0]) == (variant != "pause")
    check_against_the_model(model, content, ids, list(range(len(SUMS) - 1)))


def test_the_mean_is_that_of_the_thoughts() -> None:
    model, tokenizer = of_characters()
    content = thoughts_of(model, tokenizer, SUMS[:12], ViewOptions(top_k=13, thoughts=3))
    for position in content["positions"]:
        after = [dict(map(tuple, thought["after"])) for thought in position["thoughts"]]
        for token, share in position["mean"]:
            assert share == pytest.approx(sum(each[token] for each in after) / 3, rel=2e-2, abs=1e-6)


def test_a_long_text_is_thought_about_in_windows_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each position with the tokens of its own window before it and nothing else, a few positions at a time."""
    monkeypatch.setattr(viewed_thoughts, "LOGIT_ELEMENTS", 13 * 14)  # 7 positions of 2 thoughts
    model, tokenizer = of_characters()
    content = thoughts_of(model, tokenizer, SUMS * 2, ViewOptions(training_length=16))
    ids = content["text"]["tokens"]
    assert (content["settings"]["window"], content["settings"]["overlap"]) == (16, 8)
    plan = windows(len(ids), range(len(ids) - 1), 16, 2, 100)
    assert len(plan) > 8
    for window in (plan[0], plan[1], plan[5], plan[-1]):
        text = torch.tensor([ids[window.start : window.end]])
        check_against_the_model(model, content, text, list(window.anchors), window.start)


def test_batches_do_not_repeat_thoughts() -> None:
    """Random numbers of their own: equal lines far apart are not thought about alike."""
    model, tokenizer = of_characters(thought_length=6)
    content = thoughts_of(model, tokenizer, SUMS[:10] * 12, ViewOptions(window=20, temperature=5.0))
    later = [position["thoughts"][0]["tokens"] for position in content["positions"][20:]]
    assert len({tuple(tokens) for tokens in later}) > 0.9 * len(later)


def test_the_same_seed_gives_the_same_file() -> None:
    model, tokenizer = of_characters()
    texts = [json.dumps(thoughts_of(model, tokenizer, SUMS, ViewOptions(seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_thoughts_are_the_most_probable() -> None:
    model, tokenizer = of_characters()
    content = thoughts_of(model, tokenizer, SUMS[:20], ViewOptions(greedy=True))
    ids = torch.tensor([content["text"]["tokens"]])
    wanted = model.think(ids, thoughts_per_position=1, greedy=True).tokens[0].tolist()
    assert [position["thoughts"][0]["tokens"] for position in content["positions"]] == wanted
    assert content["settings"]["temperature"] is None and content["settings"]["thoughts"] == 1


def test_positions_are_those_of_the_whole_text() -> None:
    model, tokenizer = of_characters()

    def thought_at(positions: str, **options: Any) -> list[int]:
        content = thoughts_of(model, tokenizer, SUMS, ViewOptions(positions=positions, **options))
        return [position["token"] - 1 for position in content["positions"]]

    ids = torch.tensor([tokenizer(SUMS, add_special_tokens=False)["input_ids"]])
    for positions in ("every:7", "entropy:5", "entropy:0.2"):
        assert thought_at(positions) == model.choose_anchors(ids, None, positions)[0].tolist()
    assert thought_at("every:7", window=12) == list(range(0, len(SUMS) - 1, 7))
    assert len(thought_at("entropy:5", window=12)) == 5


@settings(max_examples=60)
@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 20), st.integers(1, 9), st.data())
def test_windows_hold_every_position_once(length: int, lookahead: int, more: int, most: int, data: Any) -> None:
    window = 2 * lookahead + 2 + more
    anchors = sorted(data.draw(st.sets(st.integers(0, length - 2), min_size=1)))
    plan = windows(length, anchors, window, lookahead, most)
    assert [anchor for part in plan for anchor in part.anchors] == anchors
    for part in plan:
        assert 0 <= part.start < part.end <= length and part.end - part.start <= window
        assert 1 <= len(part.anchors) <= most
        for anchor in part.anchors:
            assert part.start == 0 or anchor - part.start >= overlap(window)
            assert min(anchor + lookahead, length - 1) < part.end  # every token that it is measured on


def test_the_size_of_windows() -> None:
    assert window_size(None, 40, 256, 11, 1) == 40
    assert window_size(None, None, 256, 11, 1) == 245
    assert window_size(None, 300, 256, 11, 1) == 245
    assert window_size(None, None, None, 11, 1) is None
    assert window_size(30, 40, 256, 11, 1) == 30
    for window, context, wanted in ((3, 256, "4 to 245"), (246, 256, "4 to 245"), (3, None, "at least 4")):
        with pytest.raises(ConfigError, match=f"window: got {window}, needs {wanted} tokens"):
            window_size(window, None, context, 11, 1)
    with pytest.raises(ConfigError, match="12 positions and a thought takes 11"):
        window_size(None, None, 12, 11, 1)


def test_tokens_look_like_their_text() -> None:
    model, tokenizer = of_words()
    ids, cut = encode(WORDS[:60] + HOSTILE, tokenizer, 1000, "text")
    extra = len(tokenizer)
    texts = vocabulary(tokenizer, [*ids, extra])
    added = pieces(ids, texts)
    shown = [added.get(index, texts[token]) for index, token in enumerate(ids)]
    assert not cut and any(isinstance(text, list) for text in shown)
    assert "".join(text for text in shown if isinstance(text, str)) == WORDS[:60] + HOSTILE
    assert model.head.weight.shape[0] > extra and texts[extra] == f"⟨{extra}⟩"  # an embedding without a token


def test_a_character_that_never_ends_is_bytes() -> None:
    texts: dict[int, str | list[int]] = {0: [0xE6], 1: "a", 2: [0x97, 0xA5], 3: [0xA5]}
    assert pieces([0, 1, 0, 2, 3, 0], texts) == {3: "日"}


def test_the_file(tmp_path: Path) -> None:
    model, tokenizer = of_words()
    seen = []
    page = write_view(
        model,
        tokenizer,
        HOSTILE,
        tmp_path / "new" / "thoughts.html",
        tokens=40,
        text_name="a.txt",
        model_name="m",
        progress=lambda done, total: seen.append((done, total)),
    )
    raw = page.with_suffix(".json").read_text(encoding="ascii")
    content = json.loads(raw)
    assert content["version"] == 1 and content["title"] == "a.txt · thoughts of m"
    assert list(content) == [
        *("version", "title", "model", "settings", "environment", "text", "vocabulary", "positions")
    ]
    assert seen[-1] == (39, 39) and content["text"]["cut"] is True
    assert {"python", "packages", "git"} == set(content["environment"])
    mentioned = set(content["text"]["tokens"])
    for position in content["positions"]:
        assert set(position) == {"token", "base", "before", "mean", "thoughts"}
        assert [len(position["base"])] * 2 == [len(thought["talk"]) for thought in position["thoughts"]]
        for thought in position["thoughts"]:
            assert set(thought) == {"tokens", "logprob", "weight", "talk", "reward", "advantage", "after"}
            mentioned.update(thought["tokens"])
        for listed in (position["before"], position["mean"], *(thought["after"] for thought in position["thoughts"])):
            assert len(listed) == 8
            mentioned.update(token for token, _ in listed)
    assert mentioned == set(map(int, content["vocabulary"]))
    assert str(tmp_path) not in raw and str(Path.cwd()) not in raw  # nothing of this machine


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    model, tokenizer = of_characters()
    with torch.no_grad():
        model.mixing_head.output.bias.fill_(math.nan)
    content = json.loads(write_view(model, tokenizer, SUMS[:9], tmp_path / "a.html").with_suffix(".json").read_bytes())
    assert content["positions"][0]["thoughts"][0]["reward"] is None
    assert content["positions"][0]["base"][0] is not None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"ab\x00c", "a.txt: not UTF-8 text: byte 2 is zero"),
        (b"\xef\xbb\xbfab\xffc", r"a.txt: not UTF-8 text: .* 0xff at byte 3 of the line"),
        ("é".encode("latin-1"), r"a.txt: not UTF-8 text: .* 0xe9 at byte 1 of the line"),
        (b"", "a.txt: no text in it"),
        (b" \n\t", "a.txt: no text in it"),
        (None, "a.txt: no such file"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_text(file)


def test_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\nthree"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é".encode())))
    assert read_text("-") == "é"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "text: has no text"),
        ("2", r"text: 1 token\(s\), needs at least 2"),
        ("2+x", "text: the model's tokenizer can't encode it"),
        ("2+\ud800", "text: the model's tokenizer can't encode it"),
    ],
)
def test_a_text_that_the_model_cannot_read_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    model, tokenizer = of_characters()
    with pytest.raises(DataError, match=problem):
        write_view(model, tokenizer, text, tmp_path / "thoughts.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tokens": 1}, "tokens: got 1"),
        ({"thoughts": 0}, "thoughts: got 0"),
        ({"greedy": True, "thoughts": 2}, "thoughts: got 2 with greedy"),
        ({"greedy": True, "temperature": 1.0}, "temperature: got 1.0 with greedy"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"positions": "some"}, "positions: got 'some'"),
        ({"window": 1000}, "window: got 1000, needs 6 to"),
        ({"windows": 3}, "windows: unknown, the options are tokens"),
        ({"out": "x.json"}, "out"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    model, tokenizer = of_characters()
    out = tmp_path / options.pop("out", "thoughts.html")
    with pytest.raises(ConfigError, match=problem):
        write_view(model, tokenizer, SUMS, out, **options)
    assert list(tmp_path.iterdir()) == []
