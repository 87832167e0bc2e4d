"""The embedded default and its options, each a row: what the thinking model learns on the textbook of sums.

    python benchmarks/textbook.py

Every row is `python -m quietstar.train` with the options shown, over the same seeds; rows whose textbook is the same
start from the same character models. The first row runs the controls too and is the table and figure of the README.
Writes textbook.md and textbook.svg to `--results`, and textbook_options.md where there are other rows; what is finished
is kept in `--output`, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar.config.commands import parse_train_config
from quietstar.config.options import parse_positions
from quietstar.demos.results import COLUMNS, CURVES, markdown, spread
from quietstar.demos.textbook import run_textbook

ROWS: dict[str, dict[str, str]] = {
    "default": {},
    "thought length 4": {"model.thought_length": "4"},
    "thought length 16": {"model.thought_length": "16"},
    "lookahead 3": {"model.lookahead": "3"},
    "4 thoughts per position": {"model.thoughts_per_position": "4"},
    "a quarter of the positions, by entropy": {"model.positions": "entropy:0.25"},
    "half of the positions, by entropy": {"model.positions": "entropy:0.55"},
    "3 or 4 operands": {"textbook.operands": "3-4"},
    "3 or 4 operands, read for longer": {"textbook.operands": "3-4", "textbook.pretraining_steps": "3600"},
    "3 to 5 operands": {"textbook.operands": "3-5"},
    "10 % of asides useful": {"textbook.useful_asides": "0.1"},
    "10 % of asides useful, read for longer": {
        "textbook.useful_asides": "0.1",
        "textbook.pretraining_steps": "3600",
    },
    "3 % of asides useful": {"textbook.useful_asides": "0.03"},
}
SHOWN = ("answer NLL, no thought", "answer NLL, with thought", "accuracy, with thought", "correct workings")


def stream_tokens(changed: dict[str, str]) -> int:
    """Tokens of all streams of one text, to which the cost of a step is nearly proportional."""
    config = parse_train_config([word for key, value in changed.items() for word in (f"--{key}", value)])
    model, places = config.model, config.data.length - 1
    kind, share = parse_positions(model.positions)
    anchors = {"all": places, "entropy": round(share * places)}[kind]
    return anchors * model.thoughts_per_position * (model.thought_length + 1 + model.lookahead)


def run(name: str, options: argparse.Namespace, shared: Path) -> dict[str, Any]:
    """One row: measures by seed and arm."""
    changed = ROWS[name]
    out = options.output / name.replace(" ", "-").replace("%", "percent").replace(",", "")
    words = ["--output_dir", str(out), "--textbook.seeds", str(options.seeds)]
    words += ["--training.threads", str(options.threads)]
    words += [word for key, value in changed.items() for word in (f"--{key}", value)]
    if name != "default":
        words += ["--textbook.controls", "false"]
        if not any(key.startswith("textbook.") for key in changed):
            for base in shared.glob("seed-*/base"):
                target = out / base.parent.name / "base"
                if not target.exists():
                    new = target.with_name("base.new")
                    shutil.rmtree(new, ignore_errors=True)
                    shutil.copytree(base, new)
                    new.rename(target)
    print(f"== {name}: python -m quietstar.train {' '.join(words)}", flush=True)
    config = parse_train_config(words)
    run_textbook(config)
    return dict(json.loads((out / "results.json").read_text()))


def options_markdown(measured: dict[str, dict[str, Any]]) -> str:
    """The table of all rows: measures of each, by seed and arm."""
    columns = ["option", "command line", "seeds", "stream tokens per text", "correct workings before", *SHOWN]
    table = []
    for name, results in measured.items():
        flags = " ".join(f"--{key} {value}" for key, value in ROWS[name].items()) or "-"
        before = [COLUMNS["correct workings"](arms["before"]) for arms in results.values()]
        cells = [spread([COLUMNS[column](arms["quietstar"]) for arms in results.values()]) for column in SHOWN]
        table.append([name, f"`{flags}`", str(len(results)), str(stream_tokens(ROWS[name])), spread(before), *cells])
    return (
        "Mean ± standard error over the seeds, after 100 steps of Quiet-STaR, on held-out sums; NLL in nats, chance is "
        "ln 7 = 1.946. A working counts as correct as far as it fits into the thought (4 tokens hold half of it).\n\n"
        "Where there are no correct workings before, the character model has not learned them from its textbook, and "
        "there is nothing to select. Workings of several lengths have to fit one thought length. Entropy cannot tell "
        "the answer from the operands, which are as uncertain and can't be predicted at all: a quarter of the places "
        "goes to operands alone.\n\n" + markdown_table(columns, table, text_columns=2)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_folders("runs/textbook-options")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_threads(2)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    options = parser.begin(arguments)
    shared = options.output / "default"
    measured: dict[str, dict[str, Any]] = {}
    for name in options.rows:
        measured[name] = run(name, options, shared)
        if name == "default":
            config = parse_train_config(["--textbook.seeds", str(options.seeds)])
            body = markdown(config, {int(seed): arms for seed, arms in measured[name].items()})
            title = "The embedded default, with its controls"
            parser.write(options.results / "textbook", title, body, after="\n![curves](textbook.svg)")
            shutil.copy(shared / CURVES, options.results / "textbook.svg")
        if len(options.rows) > 1:
            title = "Options of the embedded default"
            parser.write(options.results / "textbook_options", title, options_markdown(measured))


if __name__ == "__main__":
    main()
