"""What a benchmark's script does before and after it measures: its command line, its threads, its files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.environment import ROOT, describe, gpu_name, write_csv, write_markdown

RESULTS = ROOT / "benchmarks" / "results"


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default of each option."""


class Benchmark(argparse.ArgumentParser):
    """The command line of a script; it remembers how the script was started and writes that beside the results.

    `facts` are the lines that make a result repeatable, from `begin` on. A script may add some.

    Args:
        file: The script's `__file__`.
        about: The script's docstring.
        formatter: Of `--help`.
    """

    def __init__(
        self,
        file: str,
        about: str | None,
        formatter: type[argparse.HelpFormatter] = argparse.RawDescriptionHelpFormatter,
    ) -> None:
        self.path = f"benchmarks/{Path(file).name}"
        self.facts: dict[str, str] = {}
        super().__init__(prog=f"python {self.path}", description=about, formatter_class=formatter)

    def add_folders(self, output: str) -> None:
        """`--output`, where a script's runs are, and `--results`."""
        self.add_argument("--output", type=Path, default=Path(output), help="of the runs; what is finished is kept")
        self.add_results()

    def add_results(self, option: str = "--results") -> None:
        self.add_argument(option, type=Path, default=RESULTS, help="folder for the tables")

    def add_out(self, name: str) -> None:
        self.add_argument("--out", type=Path, default=RESULTS / name, help="the table; beside it goes a CSV file")

    def add_data(self, needs: str) -> None:
        """`--data`, for texts that the repository does not have."""
        self.add_argument("--data", type=Path, default=os.environ.get("QUIETSTAR_DATA"), help="default: QUIETSTAR_DATA")
        self._needs = needs

    def add_quick(self, **smallest: object) -> None:
        """`--quick`, with which these options have other defaults."""
        self.add_argument("--quick", action="store_true", help="tiny sizes and few repetitions, to see that it works")
        self._smallest = smallest

    def add_threads(self, default: int | None = 1, help: str = "CPU threads of torch") -> None:
        self.add_argument("--threads", type=int, default=default, help=help)

    def begin(self, arguments: Sequence[str] | None = None, threads: int | None = None) -> argparse.Namespace:
        """Reads the command line and sets the threads of torch, if the script has imported it: it measures itself then.

        Args:
            arguments: In place of the command line's.
            threads: Of a script without the option.
        """
        given = list(sys.argv[1:] if arguments is None else arguments)
        options = self.parse_args(given)
        if "quick" in options and options.quick:
            self.set_defaults(**self._smallest)
            options = self.parse_args(given)
        if "data" in options and options.data is None:
            self.error(f"--data: missing, and QUIETSTAR_DATA is not set; needs a folder with {self._needs}")
        threads = getattr(options, "threads", threads)
        if "torch" in sys.modules and (threads is not None or "threads" in options):
            import torch

            if threads is not None:
                torch.set_num_threads(threads)
            threads = torch.get_num_threads()
        self.device = getattr(options, "device", "cpu")
        self.facts = describe(self.path, given, threads=threads)
        return options

    def write(
        self, out: Path, title: str, body: str, rows: Sequence[Mapping[str, object]] = (), after: str = ""
    ) -> None:
        """Prints the tables, and writes them to a Markdown file and the rows to a CSV file beside it.

        Args:
            out: Of the files, with or without a suffix.
            title: Of the Markdown file.
            body: The tables.
            rows: One for each measurement; without any there is no CSV file.
            after: What the Markdown file has below the tables, such as a figure.
        """
        self.save(out, title, body + after, rows)
        print(f"\n{body}\n\nwritten: {out.with_suffix('.md')}")

    def save(self, out: Path, title: str, body: str, rows: Sequence[Mapping[str, object]]) -> None:
        """`write` without a word."""
        facts = self.facts | gpu_name(self.device)
        write_markdown(out.with_suffix(".md"), title, facts, body)
        if rows:
            write_csv(out.with_suffix(".csv"), facts, rows)
