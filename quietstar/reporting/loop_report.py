"""`report.html` of a run of STaR or V-STaR, one self-contained file, and the table that the terminal shows.

Both are made from the run directory alone; `write_loop_report` and `print_table` are the entries.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quietstar.config.loops import OuterLoopConfig
from quietstar.config.presets import STAR_PRESETS, VSTAR_PRESETS
from quietstar.reporting.loop_charts import (
    accuracy_panels,
    candidates_section,
    candidates_text,
    completion_panels,
    group_names,
    kept_panels,
    sure_sentence,
)
from quietstar.reporting.loop_files import (
    MAJORITY,
    LoopRun,
    Reading,
    Row,
    Way,
    explanation,
    interval,
    iteration_table,
    ks_of,
    percent,
    printable,
    read_loop,
    text_table,
    ways,
)
from quietstar.reporting.page import (
    details,
    escaped,
    facts,
    header,
    page,
    panels,
    reading,
    readings,
    section,
    table,
    visible,
    warning_list,
)
from quietstar.reporting.run_facts import configuration, duration, machines
from quietstar.runs.files import REPORT, write_whole


def loop_report(run: LoopRun) -> str:
    """Returns the page of a run as HTML; the same files give the same page, to the byte."""
    rows = run.rows
    presets = VSTAR_PRESETS if _has_verifier(run) else STAR_PRESETS
    usual = asdict(OuterLoopConfig()) | presets.get(str(run.files.config.get("preset")), {})
    return page(
        f"{run.files.name} · {_method(run)} report",
        [
            _header(run),
            section("Warnings", [warning_list(map(str, run.summary.get("warnings", ())))]),
            section("Accuracy", [panels(accuracy_panels(rows)), _groups(rows)]),
            candidates_section(run.candidates),
            _iterations(rows),
            section("What was kept", [panels(kept_panels(rows))]),
            section("Completions", [panels(completion_panels(rows))]),
            _readings(run.readings),
            _times(run.seconds()),
            configuration(run.files.config, usual),
            machines(run.files.environment),
        ],
        "Written by quietstar from the files of the run; point at a chart for its numbers.",
    )


def _has_verifier(run: LoopRun) -> bool:
    return bool(run.candidates and run.candidates.get("compared"))


def _method(run: LoopRun) -> str:
    if not run.rows[-1]["iteration"]:
        return "fine-tuning"
    return "V-STaR" if _has_verifier(run) else "STaR"


def _header(run: LoopRun) -> str:
    config, loop = run.files.config, run.files.config.get("loop")
    hints = ""
    if isinstance(loop, Mapping) and "rationalize" in loop and run.rows[-1]["iteration"]:
        hints = "with rationalisation" if loop["rationalize"] else "without rationalisation"
    model = config.get("model")
    words = [
        _method(run),
        hints,
        f"task {run.summary.get('task')}",
        f"preset {config.get('preset')}" if config.get("preset") else "",
        str(model.get("path") or "") if isinstance(model, Mapping) else "",
    ]
    return header(run.files.name, words, _figures(run))


def _figures(run: LoopRun) -> list[tuple[str, str, str]]:
    """Returns name, value and small print of the key figures."""
    rows, last = run.rows, run.rows[-1]
    figures = [("Iterations", str(last["iteration"]), "")]
    measured = [row for row in rows if "held_out" in row]
    if measured:
        first, end = measured[0]["held_out"], measured[-1]["held_out"]
        small = [f"95 %: {interval(end, 'accuracy').partition(' ')[2].strip('[]').replace(', ', ' to ')}"]
        small += [f"before: {percent(first['accuracy'])}"] if len(measured) > 1 else []
        figures.append(("Held-out accuracy", f"{percent(end['accuracy'])} %", "; ".join(small)))
    if "sampled" in last:
        sampled = last["sampled"]
        figures.append(
            ("Training problems solved", f"{sampled['solved']:,}", f"of {sampled['problems']:,} in the last iteration")
        )
    if "built" in last:
        built = last["built"]
        figures.append(
            (
                "Kept in the last iteration",
                f"{built['kept']:,}",
                f"{built['hinted']:,} of them rationalised" if built["hinted"] else "",
            )
        )
        inside = [
            (name, built[key])
            for name, key in (("sampled", "right_inside_sample"), ("rationalised", "right_inside_rationalize"))
            if built.get(key) is not None
        ]
        if inside:
            (name, share), *others = inside
            more = "".join(f"; {other}: {percent(value)} %" for other, value in others)
            figures.append(("Right inside", f"{percent(share)} %", f"of those {name}{more}"))
    figures += _candidate_figures(run.candidates)
    seconds = sum(run.seconds().values())
    return [*figures, ("Time", duration(seconds), "of all phases")] if seconds else figures


def _candidate_figures(candidates: Row | None) -> list[tuple[str, str, str]]:
    values = ways(candidates) if candidates else {}
    if not candidates or not values:
        return []
    compared: Way = ("best-of", candidates.get("compared"))
    k = ks_of(values)[-1]
    figures = []
    for way, name in ((compared, f"Verifier's best of {k}"), (MAJORITY, f"Majority vote of {k}")):
        if k in values.get(way, {}):
            value = values[way][k]
            small = sure_sentence(candidates) if way == compared else ""
            ends = interval(value).partition(" ")[2].strip("[]").replace(", ", " to ")
            figures.append(
                (name, f"{percent(value['mean'])} %", "; ".join(filter(None, [f"95 %: {ends}" if ends else "", small])))
            )
    return figures


def _groups(rows: Sequence[Row]) -> str:
    groups = group_names(rows)
    measured = [row for row in rows if "held_out" in row]
    cells = [
        [str(row["iteration"]), *(percent(row["held_out"]["by_group"].get(group)) for group in groups)]
        for row in measured
    ]
    listed = table(cells, ("iteration", *groups), numbers=True) if groups else ""
    return listed if len(rows) == 1 else details("Held-out accuracy of each group in per cent", listed)


def _iterations(rows: Sequence[Row]) -> str:
    head, cells = iteration_table(rows)
    return section("Iterations", [table(escaped(cells), head, numbers=True)], explanation(head))


def _readings(completions: Sequence[Reading]) -> str:
    by_kind: dict[str, list[Reading]] = {}
    for one in completions:
        by_kind.setdefault(one.kind, []).append(one)
    parts = [details(f"{kind[0].upper()}{kind[1:]}", readings(map(_card, found))) for kind, found in by_kind.items()]
    return section(
        "Completions to read", parts, "Drawn at random from the training problems of the last iteration, prompt first."
    )


def _card(one: Reading) -> str:
    prompt = f'<span class="before"><bdi>{visible(one.prompt)}</bdi></span>' if one.prompt is not None else ""
    known = [
        f"answer <b>{visible(one.answer)}</b>" if one.answer is not None else "no answer found",
        f"{one.tokens:,} tokens" + (", cut off there" if one.truncated else ""),
        f"its check did not come to an end: {visible(one.failure)}" if one.failure else "",
    ]
    text = f'{prompt}<bdi class="inner">{visible(one.text)}</bdi>'
    return reading(f"problem {one.problem}", text, " · ".join(filter(None, known)))


def _times(seconds: Mapping[str, float]) -> str:
    times = facts((name.replace("_", " "), duration(time)) for name, time in seconds.items())
    return section("Time", [details("Each kind of phase, over all iterations", times)])


def print_table(summary: Mapping[str, Any]) -> None:
    """Prints one line for each iteration, then the measures of choosing among candidates, then warnings.

    Args:
        summary: Content of `summary.json`.
    """
    width = shutil.get_terminal_size((10_000, 24)).columns  # a file or pipe takes lines of any length
    head, rows = iteration_table(summary["iterations"])
    print(text_table(head, rows, width))
    print(textwrap.fill(explanation(head), min(width, 100)))
    if summary.get("candidates"):
        print(f"\n{candidates_text(summary['candidates'], width)}")
    for warning in summary.get("warnings", ()):
        print(f"warning: {printable(warning)}")


def write_loop_report(out: Path | str) -> Path:
    """Writes `report.html` into the directory of a run: one file that needs no network.

    Args:
        out: Directory of a run (`output_dir`) with its `summary.json`; other files are shown as far as they exist.

    Returns:
        Path of the page.

    Raises:
        DataError: The directory has no summary.
        OSError: The file cannot be written; an earlier one stays.
    """
    path = Path(out) / REPORT
    write_whole(path, loop_report(read_loop(Path(out))))
    return path
