"""V-STaR's embedded default over seeds: what its verifier is worth beside votes, likelihoods and other verifiers.

    python benchmarks/vstar.py

Every run is `python -m quietstar.vstar` with another seed: the problems to learn from, all weights and all samples
differ, the 300 held-out problems are the same. Writes vstar.md, vstar.csv and vstar.svg to `--results`; what is
finished is kept in `--output`, and the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import ROOT, markdown_table
from benchmarks.script import Benchmark
from quietstar.reporting.charts import WIDE, Plate, figure, keys_of, line_chart
from quietstar.reporting.loop_charts import best_of_k
from quietstar.statistics.intervals import estimate

Table = dict[str, Any]
QUICK = {
    "task": "addition",  # of one digit: a model of a few seconds is right now and then, at routes it never is
    "problems.digits": 1,
    "problems.limit": 8,
    "problems.test_limit": 8,
    "characters.layers": 1,
    "characters.hidden_size": 32,
    "characters.steps": 150,
    "characters.learning_rate": 1e-2,
    "sampling.samples": 8,
    "loop.iterations": 1,
    "loop.supervised_steps": 2,
    "loop.start_steps": 4,
    "verifier.steps": 4,
    "verifier.batch_size": 4,
    "evaluation.candidates": 4,
    "evaluation.ks": "1,2,4",
}
FIXED = {"pass": "pass@k (a perfect verifier)", "maj": "majority vote"}


def run(seed: int, options: argparse.Namespace) -> Table:
    out = options.output / f"seed-{seed}"
    words = [sys.executable, "-m", "quietstar.vstar", "--training.seed", str(seed), "--problems.seed", str(seed)]
    settings = {**(QUICK if options.quick else {}), "output_dir": out}
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))] + options.extra
    if not (out / "report.html").exists():
        print("== python", *words[1:], flush=True)
        out.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        with (out / "log.txt").open("a") as log:
            subprocess.run(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    return dict(json.loads((out / "summary.json").read_text()))


def name_of(row: Table) -> str:
    if row["measure"] in FIXED:
        return FIXED[row["measure"]]
    return str(row["score"]) + (", weighted vote" if row["measure"] == "weighted-vote" else "")


def other_of(row: Table) -> str:
    return FIXED["maj"] if row["measure"] == "maj" else name_of({**row, "score": row["other"]})


def percent(values: list[float]) -> str:
    found = estimate([100 * value for value in values])
    if found.low is None or found.high is None:
        return f"{found.mean:.1f}"
    return f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]"


def markdown(summaries: dict[int, Table]) -> str:
    tables = {seed: summary["candidates"] for seed, summary in summaries.items()}
    first = next(iter(tables.values()))
    ks = sorted({row["k"] for row in first["rows"]})
    values: dict[str, dict[int, list[float]]] = {}
    for table in tables.values():
        for row in table["rows"]:
            if row["measure"] != "weighted-vote":
                values.setdefault(name_of(row), {}).setdefault(row["k"], []).append(row["value"]["mean"])
    order = sorted(values, key=lambda name: -values[name][ks[-1]][0])
    heads = ["chosen by", *(f"k = {k}" for k in ks)]
    best = [[name, *(percent(values[name][k]) for k in ks)] for name in order]
    differences: dict[str, dict[int, list[Table]]] = {}
    for table in tables.values():
        for row in table["differences"]:
            differences.setdefault(other_of(row), {}).setdefault(row["k"], []).append(row["value"])

    def against(found: list[Table]) -> str:
        above = sum(value["low"] > 0 for value in found)
        below = sum(value["high"] < 0 for value in found)
        verdict = f"{above} of {len(found)} above" + (f", {below} below" if below else "")
        return f"{estimate([100 * value['mean'] for value in found]).mean:+.1f} ({verdict})"

    compared = [[name, *(against(found[k]) for k in ks[1:])] for name, found in differences.items()]
    areas = [
        [name, *(percent([table["discrimination"][name][kind] for table in tables.values()]) for kind in AREAS)]
        for name in first["discrimination"]
    ]
    loops = []
    for seed, summary in summaries.items():
        for row in summary["iterations"][1:]:
            sampled, built = row["sampled"], row["built"]
            share = f"{100 * sampled['accuracy']:.1f}"
            loops.append(
                [str(seed), str(row["iteration"]), share, str(built["kept"]), f"{row['distinct']['mean']:.1f}"]
            )
    return "\n".join(
        [
            f"Best-of-k in percent on {first['problems']} held-out problems with {first['fewest']} candidates each: "
            f"mean over {len(tables)} seeds, 95 % interval by Student's t over seeds. The verifier is trained by DPO "
            "with the NLL of the right completion beside it (`verifier.nll_weight` 1; the paper's is 0), from and "
            "against the SFT generator; the outcome reward model and the model of right completions alone start from "
            "the same weights and take as many steps on the same samples.\n",
            markdown_table(heads, best, text_columns=1) + "\n",
            f"Best-of-k of the {first['compared']} less each other way to choose, in points: mean over seeds, and in "
            "how many of them the 95 % interval of the paired bootstrap over problems lies above 0.\n",
            markdown_table(["against", *(f"k = {k}" for k in ks[1:])], compared, text_columns=1) + "\n",
            "AUROC in percent: over all candidates, and within problems that have both kinds.\n",
            markdown_table(["score", *AREAS], areas, text_columns=1) + "\n",
            "The loops: right samples of all, in percent; distinct right completions kept until then; and how many of "
            "them a problem got in that iteration.\n",
            markdown_table(["seed", "iteration", "right samples", "kept", "a problem"], loops, text_columns=0),
        ]
    )


AREAS = ("pooled", "within")


def write_csv(file: Path, summaries: dict[int, Table]) -> None:
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["seed", "measure", "score", "k", "mean", "low", "high"])
        for seed, summary in summaries.items():
            for row in summary["candidates"]["rows"]:
                value = row["value"]
                writer.writerow(
                    [seed, row["measure"], row["score"], row["k"], *(value[n] for n in ("mean", "low", "high"))]
                )


def draw(file: Path, summaries: dict[int, Table]) -> None:
    """One score of each model, as on a run's page; the intervals are those over seeds."""
    by_way: dict[tuple[str, int, str | None], list[float]] = {}
    for summary in summaries.values():
        for row in summary["candidates"]["rows"]:
            by_way.setdefault((row["measure"], row["k"], row["score"]), []).append(row["value"]["mean"])
    rows = [
        {"measure": measure, "k": k, "score": score, "value": vars(estimate(means))}
        for (measure, k, score), means in by_way.items()
    ]
    curves, axis = best_of_k({"rows": rows, "compared": next(iter(summaries.values()))["candidates"]["compared"]})
    title = "Held-out problems solved in per cent when one of k candidates is chosen"
    chart = line_chart(curves, label=title, size=WIDE, **axis)
    seeds = f"mean of {len(summaries)} seeds; shaded: 95 % interval over seeds"
    plates = [Plate(seeds, chart, keys_of(curves))]
    file.write_text(figure(title, plates, columns=1, size=WIDE), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_folders("runs/vstar-seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_threads(help="CPU threads of a run")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_quick(seeds=1)
    parser.add_argument("extra", nargs="*", help="after --: options of quietstar.vstar for every run")
    options = parser.begin(arguments)
    options.output = options.output.resolve()
    with ThreadPoolExecutor(options.workers) as pool:
        found = list(pool.map(lambda seed: run(seed, options), range(options.seeds)))
    summaries = dict(enumerate(found))
    body = markdown(summaries)
    options.results.mkdir(parents=True, exist_ok=True)
    write_csv(options.results / "vstar.csv", summaries)
    draw(options.results / "vstar.svg", summaries)
    title = "V-STaR on routes: what the verifier is worth"
    parser.write(options.results / "vstar", title, body, after="\n\n![Best-of-k](vstar.svg)")


if __name__ == "__main__":
    main()
