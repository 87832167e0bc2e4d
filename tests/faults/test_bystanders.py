"""Loggers and reports are worth less than the training that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import Runs, assert_same_end, happened


def test_a_logger_that_fails_is_switched_off(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the logger that is made to fail")
    text = runs.run(tmp_path, ("failing_logger", 5), training__log_to="tensorboard")
    assert "tensorboard" in text and "the logger's own fault" in text and "Traceback" not in text
    assert list((tmp_path / "tensorboard").iterdir())
    assert_same_end(tmp_path, runs.whole())


def test_a_log_directory_that_cannot_be_written(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the logger whose directory it is")
    (tmp_path / "tensorboard").mkdir(mode=0o555)
    text = runs.run(tmp_path, ("no_privileges",), training__log_to="tensorboard")
    assert "tensorboard could not be started and is switched off" in text and "Permission denied" in text
    assert_same_end(tmp_path, runs.whole())


def test_a_report_that_cannot_be_written(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    text = runs.run(tmp_path, training__report="true")
    assert "the report of step 4 failed" in text and "the last report failed" in text and "Traceback" not in text
    assert happened(tmp_path) == [(step, "report_failed") for step in (0, 4, 8)]
    assert_same_end(tmp_path, runs.whole())


def test_messages_that_nobody_reads(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("no_messages",))
    assert_same_end(tmp_path, runs.whole())
