"""`evaluate`, `view`, `gate` and `generate` read what training reads, with one rule for the texts of special tokens."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quietstar import QuietStarForCausalLM
from quietstar.data.packing import Encoder
from quietstar.data.tokenizer import ChatTemplate
from quietstar.model.loading import small_llama
from tests.data.test_fields_and_chats import CHAT, SHAREGPT, build

WORDS = "the end of a text and the user of the system reads it again "
CHATS = [CHAT, SHAREGPT, [{"role": "user", "content": "x<|im_end|>y"}, {"role": "assistant", "content": "no " * 9}]]
TOKENIZER = build(bos=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chatting")
    base = small_llama(0, len(TOKENIZER), layers=1, hidden_size=16, intermediate_size=24, heads=2, context=512, end=0)
    QuietStarForCausalLM.from_base(base, TOKENIZER, thought_length=2, lookahead=2).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


class Commands:
    """Runs the commands in this process; each leaves the tokens that it has read in `ids`."""

    field = {"evaluate": "text_field", "view": "field", "gate": "field", "generate": "field"}  # noqa: RUF012 (fixed)
    text = {"evaluate": "text", "view": "text", "gate": "text", "generate": "prompts"}  # noqa: RUF012 (fixed)

    def __init__(self, checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.checkpoint, self.out, self.capsys = checkpoint, out, capsys
        self.error, self.warned, self.printed = "", [], ""
        self.runs = 0

    def __call__(self, name: str, text: object, *arguments: str) -> int:
        self.runs += 1
        out = self.out / f"{name}{self.runs}"
        own = {
            "evaluate": ["--output_dir", str(out), "--length", "16"],
            "view": ["--out", str(out / "page.html"), "--thoughts", "1", "--positions", "every:64"],
            "gate": ["--out", str(out), "--length", "16", "--positions", "every:4"],
            "generate": ["--max_new_tokens", "2", "--json"],
        }
        given = [str(self.checkpoint), f"--{self.text[name]}", str(text), "--device", "cpu", *own[name], *arguments]
        self.capsys.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            status: int = importlib.import_module(f"quietstar.{name}").main(given)
        self.warned = [str(one.message) for one in warned if "special token" in str(one.message)]
        self.printed, errors = self.capsys.readouterr()
        self.warned += [line for line in errors.splitlines() if "has the text of a special token" in line]
        self.error = errors.strip().splitlines()[-1] if errors.strip() else ""
        return status


@pytest.fixture
def commands(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(checkpoint, tmp_path, capsys)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The token ids that a command gives to its model."""
    found: list[list[int]] = []
    for module, function, place in (
        ("quietstar.evaluation.held_out_text", "text_windows", 0),
        ("quietstar.inference.viewed_thoughts", "measure", 1),
        ("quietstar.inference.completing", "continue_texts", 2),
        ("quietstar.inference.gate", "fit_gate", 1),
    ):
        original = getattr(importlib.import_module(module), function)

        def spy(*arguments: Any, original: Any = original, place: int = place, **options: Any) -> Any:
            given = arguments[place]
            if hasattr(given, "tolist"):
                given = [token for row in given.tolist() for token in row]
            found.extend(given if given and isinstance(given[0], list | tuple) else [list(given)])
            return original(*arguments, **options)

        monkeypatch.setattr(f"{module}.{function}", spy)
    yield found


def encoded(texts: list[str], special: bool = True) -> list[int]:
    encoder = Encoder(TOKENIZER, append_eos=False, special=special)
    return [token for text in texts for token in encoder(text).tolist()]


@pytest.mark.parametrize("name", ["evaluate", "view", "gate", "generate"])
@pytest.mark.parametrize("meaning", ["parse", "text"])
def test_the_text_of_a_special_token(
    name: str, meaning: str, commands: Commands, read: list[Any], tmp_path: Path
) -> None:
    """It became the token in four commands: one said so, one counted, two said nothing, and none could prevent it."""
    texts = [f"the end<|endoftext|> of {WORDS * 4}", f"<|im_end|><|im_end|> {WORDS * 12}", WORDS * 9]
    key = "prompt" if name == "generate" else "text"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({key: text}) for text in texts))
    assert commands(name, tmp_path / "a.jsonl", "--special_tokens", meaning) == 0, commands.error
    specials = set(TOKENIZER.all_special_ids)
    found = [token for row in read[: 3 if name == "generate" else 1] for token in row]
    ends = 2 if name == "gate" else 0  # which the packing puts after each document; the last is beyond the last block
    assert sum(token in specials for token in found) == {"parse": 3, "text": 0}[meaning] + ends
    for piece in texts:
        first = encoded([piece], meaning == "parse")[:20]
        assert any(found[start : start + 20] == first for start in range(len(found)))
    told = "which becomes this token; special_tokens text prevents it" if meaning == "parse" else "(special_tokens)"
    assert len(set(commands.warned)) == 1 and told in commands.warned[0]
    assert commands.warned[0].partition(": ")[0] in (f"{tmp_path}/a.jsonl:1", "a.jsonl")


@pytest.mark.parametrize("name", ["evaluate", "view", "gate", "generate"])
def test_chats(name: str, commands: Commands, read: list[Any], tmp_path: Path) -> None:
    """evaluate and view refused chats, and generate's prompts could not be any."""
    chats = CHATS * 6 if name == "gate" else CHATS
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"meta": {"turns": chat}}) for chat in chats))
    for meaning in ("parse", "text"):
        read.clear()
        field = f"--{commands.field[name]}"
        assert commands(name, tmp_path / "a.jsonl", field, "meta.turns", "--special_tokens", meaning) == 0, (
            commands.error
        )
        template = ChatTemplate(TOKENIZER, meaning == "parse", answer=name == "generate")
        usual = [CHAT, CHAT, CHATS[2]]
        made = [encoded([template(chat)], meaning == "parse") for chat in usual]
        found = [token for row in read[: 3 if name == "generate" else 1] for token in row]
        start = 0
        for one in made:  # in this order, whatever stands between them
            size = min(len(one), 30)
            while found[start : start + size] != one[:size]:
                start += 1
                assert start < len(found)
            start += size


@pytest.mark.parametrize("name", ["evaluate", "view", "gate", "generate"])
@pytest.mark.parametrize("ending", ["jsonl.gz", "json", "csv", "ndjson.xz", "JSON.bz2", "tsv"])
def test_files_of_every_kind(name: str, ending: str, commands: Commands, read: list[Any], tmp_path: Path) -> None:
    texts = [f"{number} {WORDS * 5}" for number in range(9)]
    field = "the body"
    rows = [{"id": "7", field: text} for text in texts]
    content = "\n".join(map(json.dumps, rows)).encode()
    if ending in ("csv", "tsv"):
        comma = {"csv": ",", "tsv": "\t"}[ending]
        content = "\n".join([f"id{comma}{field}", *(f"7{comma}{text}" for text in texts)]).encode()
    pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.get(ending.rpartition(".")[2], bytes)
    (tmp_path / f"a.{ending}").write_bytes(pack(content))
    assert commands(name, tmp_path / f"a.{ending}", f"--{commands.field[name]}", field) == 0, commands.error
    assert TOKENIZER.decode(read[0]).startswith(texts[0][:40])


@pytest.mark.parametrize("name", ["evaluate", "view", "gate", "generate"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": WORDS}, "a.jsonl:2: has no field 'b' (its fields: 'txt'); {field} names the one to read"),
        ({"b": 3}, "a.jsonl:2: field 'b' is a JSON number, needs a string"),
        ({"b": [{"role": "judge", "content": "x"}]}, "a.jsonl:2: the tokenizer's chat template refuses this chat"),
        ({"b": [{"role": "user", "content": None}]}, "a.jsonl:2: b.0 has content of the type null"),
        ({"b": [{"from": "narrator", "value": "x"}]}, "a.jsonl:2: b.0.from is 'narrator'"),
        ({"b": "half \ud800"}, "a.jsonl:2: field 'b' is not valid Unicode"),
        ([1], "a.jsonl:2: holds a JSON array, needs an object"),
    ],
)
def test_errors_name_the_options_of_the_command(
    name: str, row: Any, reason: str, commands: Commands, tmp_path: Path
) -> None:
    """evaluate said `data.field names the one to read`, which is an option of training."""
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'b': WORDS * 30})}\n{json.dumps(row)}\n")
    assert commands(name, tmp_path / "a.jsonl", f"--{commands.field[name]}", "b") == 2
    assert reason.format(field=commands.field[name]) in commands.error
    assert "data." not in commands.error


@pytest.mark.parametrize("name", ["evaluate", "view", "gate", "generate"])
def test_a_tokenizer_without_a_template(name: str, checkpoint: Path, tmp_path: Path, commands: Commands) -> None:
    plain = tmp_path / "plain"
    build(template=None, bos=False).save_pretrained(plain)
    (tmp_path / "a.jsonl").write_text(json.dumps({"b": CHAT}) + "\n")
    given = (f"--{commands.field[name]}", "b", "--tokenizer", str(plain))
    assert commands(name, tmp_path / "a.jsonl", *given) == 2
    assert f"{commands.field[name]}: names chats, but the tokenizer of checkpoint has no chat" in commands.error


PIPED = {
    "text": (b"the end\nof a text\n", ["the end", "of a text"]),
    "lines": (b'{"prompt": "the end"}\n{"prompt": "of\\na text"}\n', ["the end", "of\na text"]),
    "array": (b'[{"prompt": "the end"}, {"prompt": ""}]', ["the end", ""]),
    "one object": (b'{\n  "prompt": "the end"\n}', ["the end"]),
    "packed": (gzip.compress(b'{"prompt": "the end"}\n{"prompt": "of"}\n'), ["the end", "of"]),
    "blank line": (b"the end\n\nof", ["the end", "", "of"]),
    "not quite JSON": (b'{"prompt" the end\nof', ['{"prompt" the end', "of"]),
}


@pytest.mark.parametrize("kind", PIPED)
@pytest.mark.parametrize("way", ["pipe", "standard input", "no ending"])
def test_prompts_from_a_pipe_are_read_by_their_content(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of JSON was a prompt where it came through a pipe."""
    from quietstar.inference.prompts import read_prompts

    content, wanted = PIPED[kind]
    path = tmp_path / "prompts"
    writer = None
    if way == "pipe":
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(content,))
        writer.start()
    elif way == "no ending":
        path.write_bytes(content)
    else:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    name = "-" if way == "standard input" else str(path)
    assert [prompt.text for prompt in read_prompts((), name)] == wanted
    if writer is not None:
        writer.join()


def test_a_chat_is_answered_or_its_answer_continued() -> None:
    user = [{"role": "user", "content": "Hi"}]
    begun = [*user, {"role": "assistant", "content": "Hello the"}]
    template = ChatTemplate(build(bos=False), answer=True)
    assert template(begun).endswith("<|im_start|>assistant\nHello the")
    assert template(user).startswith("<s><|im_start|>user\nHi<|im_end|>")
