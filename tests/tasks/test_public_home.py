"""Problems from their public home: rows of parquet files, which a directory holds here instead of the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from quietstar.config.loops import ProblemOptions
from quietstar.errors import ConfigError
from quietstar.tasks import load_task
from quietstar.tasks.gsm8k import GSM8K


def test_rows_become_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main").mkdir()
    table = pyarrow.table({"question": ["One?", "Two?"], "answer": ["#### 1", "2 it is\n#### 2"]})
    parquet.write_table(table, tmp_path / "main" / "train-00000-of-00001.parquet")
    assert GSM8K.home is not None
    monkeypatch.setattr(GSM8K, "home", replace(GSM8K.home, dataset=str(tmp_path)))
    first, second = load_task("gsm8k", ProblemOptions()).problems("train")
    assert (first.question, first.answer, second.rationale) == ("One?", "1", "2 it is\n#### 2")
    assert second.place.endswith("train-00000-of-00001.parquet:2")


@pytest.mark.parametrize("name", ["gsm8k", "commonsenseqa", "math"])
def test_without_network_the_message_says_what_to_download(name: str) -> None:
    with pytest.raises(ConfigError, match=r"problems\.path: missing, and the hub .* download .* from https://"):
        load_task(name, ProblemOptions()).problems("train")
