"""What a file of somebody else cannot do: fill the memory, or run code through a chat template."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest

from quietstar.data import kinds
from quietstar.data.rows import BadRow, BadRows
from quietstar.data.sources import read_documents
from quietstar.data.tokenizer import ChatTemplate
from quietstar.errors import DataError
from tests.data.test_fields_and_chats import build
from tests.data.test_kinds import PACK

LONG = 20_000_000
ROWS = {"a.jsonl": ('{"text": "%s"}\n', '{"text": "b"}\n'), "a.json": ('[{"text": "%s"}', ',{"text": "b"}]')}


@contextmanager
def bounded() -> Iterator[None]:
    """Less memory is taken than the content of a file."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LONG * 0.6  # of it 9 MB are the window of xz
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_bounded_however_small_its_file(name: str, packed: str, tmp_path: Path) -> None:
    """20 MB of one letter are 20 kB in a packed file; they are passed over without being in memory."""
    first, last = ROWS[name]
    file = tmp_path / (name + packed)
    file.write_bytes(PACK[packed]((first % ("a" * LONG) + last).encode()))
    with bounded(), pytest.warns(UserWarning, match="longer than 10000 bytes"):
        documents = list(read_documents(file, bad_rows=BadRows("skip"), max_row_bytes=10_000))
    assert [document.text for document in documents] == ["b"]


TABLE_ROWS = {
    "one field": "text\n{}\nb\n",
    "quoted": 'text\n"{}"\nb\n',
    "a quote opens before it": 'text\n"one\n{}\n"\nb\n',
    "a quote opens in it": 'text\n"{}\n two"\nb\n',
    "quotes in it": 'text\n"{} ""said"" "\nb\n',
    "a quote closes in it": 'text\n"one\ntwo {}"\nb\n',
}


@pytest.mark.parametrize(
    ("content", "name", "packed"),
    [*product(TABLE_ROWS.values(), ["a.csv", "a.tsv"], [""]), *product([TABLE_ROWS["quoted"]], ["a.csv"], PACK)],
)
def test_a_row_of_a_table_is_bounded_however_small_its_file(
    content: str, name: str, packed: str, tmp_path: Path
) -> None:
    """Whatever another file of the same process was allowed: Python's own limit is one for all."""
    csv.field_size_limit(2 * LONG)
    file = tmp_path / (name + packed)
    file.write_bytes(PACK[packed](content.format("a" * LONG).encode()))
    with bounded(), pytest.warns(UserWarning, match=rf"{name}.*:\d: longer than 10000 bytes"):
        documents = list(read_documents(file, bad_rows=BadRows("skip"), max_row_bytes=10_000))
    assert [document.text for document in documents] == ["b"]
    with pytest.raises(DataError, match=rf"{name}.*:\d: longer than 10000 bytes"):
        list(read_documents(file, max_row_bytes=10_000))


@pytest.mark.parametrize("row", ['"{}"', '"{}",b'])
def test_a_row_of_many_short_lines_is_bounded(row: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\n" + row.format("short\n" * (LONG // 6)) + "\nb\n")
    with bounded(), pytest.warns(UserWarning, match="longer than 10000 bytes"):
        documents = list(read_documents(file, bad_rows=BadRows("skip"), max_row_bytes=10_000))
    assert [document.text for document in documents] == ["b"]


@pytest.mark.parametrize("size", [99, 100, 101])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_row_of_a_table_may_be_as_long_as_the_limit(size: int, end: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(f"id,text{end or chr(10)}1,{'é' + 'a' * (size - 4)}{end}".encode())
    if size > 100:
        with pytest.raises(DataError, match=r"a\.csv:2: longer than 100 bytes"):
            list(read_documents(file, max_row_bytes=100))
    else:
        assert len(list(read_documents(file, max_row_bytes=100))) == 1


def test_a_header_of_a_table_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"{'a' * 200}\nb\n")
    with pytest.raises(DataError, match=r"a\.csv:1: the header is longer than 100 bytes"):
        list(read_documents(file, max_row_bytes=100))


@pytest.mark.parametrize("packed", PACK)
def test_a_text_is_bounded_however_small_its_file(packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MOST_TEXT", 100_000)
    file = tmp_path / f"a.txt{packed}"
    file.write_bytes(PACK[packed](b"a" * LONG))
    with bounded(), pytest.raises(DataError, match=r"a\.txt.*: longer than 100000 bytes; split it"):
        list(read_documents(file))
    file.write_bytes(PACK[packed](b"a " * 50_000))
    assert [len(document.text) for document in read_documents(file)] == [100_000]


TEMPLATES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__cla' ~ 'ss__}').format_map({'0': messages}) }}",
    "{{ cycler.__init__.__globals__.os.mkdir(MARKER) }}",
    "{{ lipsum.__globals__['os'].mkdir(MARKER) }}",
    "{{ joiner.__init__.__globals__.os.mkdir(MARKER) }}",
    "{{ namespace.__init__.__globals__.os.mkdir(MARKER) }}",
    "{{ self.__init__.__globals__.__builtins__.open(MARKER, 'w') }}",
    "{{ strftime_now.__globals__['os'].mkdir(MARKER) }}",
    "{{ raise_exception.__globals__['os'].mkdir(MARKER) }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ (messages|string).format.__self__.__class__ }}",
    "{% import 'os' as os %}{{ os.mkdir(MARKER) }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ open(MARKER, 'w') }}",
    "{{ __import__('os').mkdir(MARKER) }}",
    "{{ messages.append({'role': 'user', 'content': 'forged'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(content='forged') }}",
    "{% for n in range(10**9) %}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_runs_in_its_sandbox(template: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    chat = [{"role": "user", "content": "hi"}]
    try:
        text = str(ChatTemplate(build(template=template.replace("MARKER", repr(str(marker)))))(chat))
    except BadRow as error:
        assert "the tokenizer's chat template refuses this chat" in str(error)
    else:
        assert text in ("", "[Undefined]")  # what a template may not see is not there
    assert chat == [{"role": "user", "content": "hi"}]
    assert not marker.exists()


def test_the_templates_would_do_harm_without_a_sandbox(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    marker, chat = tmp_path / "executed", [{"role": "user", "content": "hi"}]
    harmful: list[Any] = []
    for template in TEMPLATES[:-1]:
        source = template.replace("MARKER", repr(str(marker)))
        try:
            text = jinja2.Environment().from_string(source).render(messages=json.loads(json.dumps(chat)))
        except Exception:  # what a template that fails raises depends on what it reached for
            continue
        harmful += [template] * (marker.exists() or text not in ("", "[Undefined]"))
        if marker.is_dir():
            marker.rmdir()
    assert len(harmful) > 8
