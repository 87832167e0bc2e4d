"""Records of what is measured of each item, written to disk at once, so that a killed evaluation continues where it
was.

`counted` and `so_far` show the progress of an evaluation: a bar on a terminal, a line for each part elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quietstar.config.parsing import parse_json
from quietstar.errors import ConfigError, naming
from quietstar.model.modeling import QuietStarForCausalLM

Record = dict[str, Any]
NAMES = ("_name_or_path", "transformers_version", "_from_model_config")
"""Fields of a configuration that do not change what a model does."""


class ItemStore:
    """A JSONL file of records, which are found by what they were made from.

    Records of another model or other settings stay in the file and are ignored.

    Args:
        path: Path of `evaluation_items.jsonl`. An incomplete last line, from a killed process, is ignored.

    Raises:
        ConfigError: The file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._records: dict[str, Record] = {}
        self._path = path
        try:
            content = path.read_bytes() if path.exists() else b""
            whole, _, torn = content.rpartition(b"\n")
            for line in whole.split(b"\n"):
                record = _read(line)
                if record is not None:
                    self._records[str(record["key"])] = record
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
            if torn:
                self._file.write("\n")
        except OSError as error:
            raise ConfigError(f"output_dir: cannot use {path}: {error.strerror}") from None

    def get(self, key: str) -> Record | None:
        """Returns the record of a key; None where there is none."""
        return self._records.get(key)

    def add(self, key: str, record: Record) -> None:
        """Keeps a record, in memory and on disk."""
        self._records[key] = record
        with naming(self._path):
            self._file.write(json.dumps({"key": key, **record}, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with naming(self._path):
            self._file.close()


def key_of(*parts: object) -> str:
    """Returns the key of a record: a hash of what it is made from.

    Args:
        parts: Plain JSON values that the record depends on.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def fingerprint(model: QuietStarForCausalLM, entries: int = 64) -> str:
    """Returns a hash of a model: of some entries of each tensor, all shapes and dtypes, and its configurations.

    Args:
        model: Model with its weights loaded.
        entries: Number of evenly spread entries of each tensor.
    """
    advice = model.generation_config
    configurations = [model.config.to_dict(), {} if advice is None else advice.to_dict()]
    digest = hashlib.sha256(json.dumps(_nameless(configurations), sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        tensor: Tensor = value.detach().flatten()
        some = tensor[:: max(1, tensor.numel() // entries)][:entries].double().cpu()
        digest.update(f"{name} {list(value.shape)} {value.dtype} {some.tolist()}\n".encode())
    return digest.hexdigest()[:32]


def _nameless(configuration: Any) -> Any:
    """Returns a configuration without the fields that change where a model is moved, or saved by another version."""
    if isinstance(configuration, dict):
        return {str(name): _nameless(value) for name, value in configuration.items() if name not in NAMES}
    return [_nameless(one) for one in configuration] if isinstance(configuration, list) else configuration


def _read(line: bytes) -> Record | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "key" in record else None


@contextmanager
def counted(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Shows how many items are done on stderr; nothing where there are none to do.

    Args:
        name: Description of what is done to the items.
        total: Number of items to do.
    """
    if not total:
        yield lambda done: None
        return
    start = time.perf_counter()
    terminal = sys.stderr.isatty()
    with tqdm(total=total, desc=name, leave=False, disable=not terminal, file=sys.stderr) as bar:
        yield bar.update
    print(f"{name}: {total:,} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def so_far(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress on stderr for code that reports how many of how many items are done."""
    start = time.perf_counter()
    with tqdm(desc=name, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
