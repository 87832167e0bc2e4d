"""What the scripts share: their command lines, and the files that they write."""

from __future__ import annotations

import csv
import importlib
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.environment import ROOT
from benchmarks.script import RESULTS, Benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


def committed_commands() -> set[str]:
    """The command lines that results say they were measured with."""
    files = [file for file in RESULTS.iterdir() if file.suffix in (".md", ".csv")]
    found = (re.findall(r"(?m)command: `?(python benchmarks/.*?)`?$", file.read_text()) for file in files)
    return {command for commands in found for command in commands}


class Read(Exception):
    """The command line has been read."""


def test_each_result_names_a_command_that_its_script_still_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Benchmark, arguments: list[str]) -> Namespace:
        super(Benchmark, self).parse_args(arguments)
        raise Read

    monkeypatch.setattr(Benchmark, "parse_args", stop)
    commands = committed_commands()
    assert len(commands) > 15
    for command in commands:
        _, script, *arguments = shlex.split(command)
        assert (ROOT / script).is_file(), command
        with pytest.raises(Read):
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(arguments)


def test_both_files_hold_how_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Benchmark("anywhere/lengths.py", "Lengths.")
    script.add_threads(2)
    script.add_out("lengths")
    options = script.begin(["--out", str(tmp_path / "deep" / "found.md")])
    assert options.threads == torch.get_num_threads() == 2
    script.facts["ruler"] = "wooden"
    script.write(options.out, "Lengths", "| m |", [{"m": 3}, {"m": 4}], after="\n\n![figure](found.png)")
    text = (tmp_path / "deep" / "found.md").read_text()
    assert text.startswith("# Lengths\n\n| m |\n\n![figure](found.png)\n\n## Measured with\n\n")
    lines = (tmp_path / "deep" / "found.csv").read_text().splitlines()
    for name, value in (("command", "python benchmarks/lengths.py --out found.md"), ("torch threads", "2")):
        assert f"- {name}: `{value}`" in text and f"# {name}: {value}" in lines
    assert "- ruler: `wooden`" in text and list(csv.reader(lines[-3:])) == [["m"], ["3"], ["4"]]
    assert "| m |" in capsys.readouterr().out


def test_a_script_without_rows_writes_no_csv(tmp_path: Path) -> None:
    script = Benchmark("lengths.py", None)
    script.begin([], threads=1)
    script.write(tmp_path / "found", "Lengths", "none")
    assert [file.name for file in tmp_path.iterdir()] == ["found.md"]
    assert "torch threads: `1`" in (tmp_path / "found.md").read_text()


def test_missing_data_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("QUIETSTAR_DATA", raising=False)
    script = Benchmark("lengths.py", None)
    script.add_data("rulers/")
    with pytest.raises(SystemExit):
        script.begin([])
    assert "--data: missing, and QUIETSTAR_DATA is not set; needs a folder with rulers/" in capsys.readouterr().err
