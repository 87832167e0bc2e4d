"""Nested fields, chats through the tokenizer's template, and the texts of special tokens in a user's text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.config.training import DataOptions, TrainConfig, run_options
from quietstar.data.loading import load_batches, load_texts
from quietstar.data.packing import Encoder
from quietstar.data.rows import BadRow, Row, text_of
from quietstar.data.tokenizer import ChatTemplate
from quietstar.errors import ConfigError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
)


def build(*, template: str | None = TEMPLATE, bos: bool = True) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["user assistant system im_start endoftext the end of a text"] * 20, trainer)
    if bos:  # the tokenizer puts a BOS of its own before each text, as Llama's does
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", SPECIAL.index("<s>"))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<s>",
        additional_special_tokens=SPECIAL[1:3],
    )
    fast.chat_template = template
    return fast


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("meta.text", "inner"),
        ("meta.url", "literal"),
        ("a.b.c", "deep"),
        ("x.y.z", "half literal"),
        ("turns.0.content", "first"),
        ("turns.1.content", "second"),
        ("", None),
        ("meta.txt", None),
        ("turns.2.content", None),
        ("turns.-1.content", None),
        ("turns.0", None),
        ("meta", None),
        ("meta.text.0", None),
    ],
)
def test_nested_fields(field: str, wanted: str | None) -> None:
    record: dict[str, Any] = {"meta": {"text": "inner", "url": "no"}, "meta.url": "literal"}
    record |= {"a": {"b": {"c": "deep"}}, "x.y": {"z": "half literal"}, "turns": [{"content": "first"}]}
    record["turns"].append({"content": "second"})
    row = Row("a.jsonl", 0, json.dumps(record).encode())
    if wanted is None:
        with pytest.raises(BadRow, match=r"needs a string|its fields: 'meta\.text', 'meta\.url', .*'a\.b\.c'"):
            text_of(row, field)
    else:
        assert text_of(row, field) == wanted


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\r\n"}]
CHAT += [{"role": "assistant", "content": "Hello the end"}]
SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]
SHAREGPT += [{"from": "gpt", "value": "Hello the end"}]
PARTS = [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in CHAT]


@pytest.mark.parametrize("chat", [CHAT, SHAREGPT, PARTS])
@pytest.mark.parametrize("special", [True, False])
def test_a_chat_is_what_the_template_makes_of_it(chat: list[dict[str, Any]], special: bool) -> None:
    tokenizer = build()
    text = text_of(Row("a", 0, json.dumps({"messages": chat}).encode()), "messages", ChatTemplate(tokenizer, special))
    wanted = tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    ids = Encoder(tokenizer, append_eos=False, special=special)(text or "").tolist()
    assert ids == wanted
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


@pytest.mark.parametrize(
    "word", ["<|im_end|>", "<|endoftext|>", "<s>", "a<|im_start|>system\nb", "<|im_end|><|im_end|>"]
)
def test_a_user_of_a_chat_cannot_write_the_templates_tokens(word: str) -> None:
    tokenizer = build()
    chat = [{"role": "user", "content": f"say {word} now"}, {"role": "assistant", "content": "no"}]
    row = Row("a", 0, json.dumps({"messages": chat}).encode())
    for special in (True, False):
        text = text_of(row, "messages", ChatTemplate(tokenizer, special))
        encoder = Encoder(tokenizer, append_eos=False, special=special)
        ids = encoder(text or "").tolist()
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False)
        found = sum(token in tokenizer.all_special_ids for token in ids)
        written = sum(word.count(token) for token in SPECIAL)
        assert found == 1 + 4 + (written if special else 0)
        assert encoder.special_in(text or "") == written


def test_a_chat_that_ends_in_the_ending_token_gets_no_other() -> None:
    tokenizer = build(template="{{ messages[0].content }}{{ eos_token }}")
    text = ChatTemplate(tokenizer)([{"role": "user", "content": "hi"}])
    assert Encoder(tokenizer)(text).tolist().count(tokenizer.eos_token_id) == 1
    assert Encoder(tokenizer)("hi<|endoftext|>").tolist().count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([{"role": "judge", "content": "x"}], "the tokenizer's chat template refuses this chat: .*unknown role judge"),
        ([{"role": "user", "content": None}], r"messages\.0 has content of the type null"),
        ([{"role": "user", "content": [{"type": "image_url", "url": "x"}]}], r"messages\.0\.content\.0 .* 'image_url'"),
        ([{"role": 3, "content": "x"}], r"messages\.0\.role is a JSON number"),
        ([{"from": "narrator", "value": "x"}], r"messages\.0\.from is 'narrator', needs one of human, gpt"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], r"messages\.0 has tool calls"),
        ([{"role": "user", "content": " "}], "has no text in it"),
        (["x"], r"is a JSON array, needs a string or a chat"),
        ([], r"is a JSON array, needs a string or a chat"),
    ],
)
def test_a_chat_that_cannot_be_read(chat: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        text_of(Row("a", 0, json.dumps({"messages": chat}).encode()), "messages", ChatTemplate(build()))


def test_a_tokenizer_without_a_template_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    for on_bad_row in ("stop", "skip"):
        options = DataOptions(path=str(tmp_path / "a.jsonl"), field="messages", length=4, on_bad_row=on_bad_row)
        with pytest.raises(ConfigError, match=r"data\.field: .*no chat template"):
            load_texts(options, build(template=None))


TEXTS = [
    "the end<|endoftext|> of",
    "<|endoftext|>",
    "a <s>struck</s> word",
    "<|im_start|><|im_end|>\n",
    "x<|endoftext|>" * 3,
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_a_special_token_is_characters_where_asked_for(text: str) -> None:
    tokenizer = build()
    written = sum(text.count(token) for token in SPECIAL)
    for special in (True, False, True):  # a tokenizer must not remember the setting
        ids = Encoder(tokenizer, append_eos=False, special=special)(text).tolist()
        assert sum(token in tokenizer.all_special_ids for token in ids) == (written if special else 0)
        assert tokenizer.decode(ids) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_of_mistrals_tokenizer(mistral_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = Encoder(mistral_tokenizer, append_eos=False)("a </s> b").tolist()
    assert mistral_tokenizer.eos_token_id in ids
    try:
        ids = Encoder(mistral_tokenizer, append_eos=False, special=False)("a </s> b").tolist()
    except ConfigError as error:
        assert "data.special_tokens: got text, but this tokenizer reads '</s>' as the token" in str(error)
    else:
        assert mistral_tokenizer.eos_token_id not in ids


def test_a_tokenizer_that_cannot_is_refused(word_tokenizer: PreTrainedTokenizerBase) -> None:
    """In a vocabulary of words the ending token is a word like any other."""
    with pytest.raises(ConfigError, match=r"data\.special_tokens: got text, but this tokenizer reads '<end>'"):
        Encoder(word_tokenizer, special=False)("a <end> a")


@pytest.mark.parametrize("source", ["files", "stream"])
@pytest.mark.parametrize("packing", ["joined", "separate", "crop"])
@pytest.mark.parametrize("meaning", ["parse", "text"])
def test_they_are_counted_and_told(tmp_path: Path, source: Any, packing: Any, meaning: Any) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text + " padding of the text"}) for text in TEXTS))
    tokenizer = build(bos=False)
    options = DataOptions(
        source=source, path=str(tmp_path), packing=packing, length=8, special_tokens=meaning, validation_fraction=0
    )
    told = "becomes this token; data.special_tokens" if meaning == "parse" else "is read as characters"
    with pytest.warns(UserWarning, match=rf"a\.jsonl:\d: has the text of a special token, which {told}") as warned:
        batches, _ = load_batches(options, tokenizer, batch_size=1, seed=0, held_out_texts=0)
        epochs = 100 if source == "stream" else 1
        for step in range(1, epochs + 1):
            batches.batch(step)
    assert len(warned) == 1
    assert batches.special == sum(text.count(token) for text in TEXTS for token in SPECIAL)
    batches.close()


def test_a_stream_with_the_option_is_another_stream_and_without_it_that_of_older_runs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the end"}))
    prints = []
    for meaning in ("parse", "text"):
        options = DataOptions(source="stream", path=str(tmp_path), length=2)
        options.special_tokens = meaning  # type: ignore[assignment]  # a text
        batches, _ = load_batches(options, build(), batch_size=1, seed=0, held_out_texts=0)
        prints.append(batches.fingerprint())
        state = batches.state_dict()
        del state["special"]
        batches.load_state_dict(state)  # of an older run
        batches.close()
    assert "special_tokens" not in prints[0]
    assert prints[1] == prints[0] | {"special_tokens": "text"}
    assert "data.special_tokens" not in run_options(TrainConfig())
