"""`report.html` of a training run: one self-contained file, made from the run directory alone."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quietstar.config.presets import TRAIN_PRESETS
from quietstar.config.training import TrainConfig
from quietstar.reporting.curves import Curves, lookahead_panels, optimisation_panels, prediction_panels, thought_panels
from quietstar.reporting.page import details, header, page, panels, reading, readings, section, table, visible
from quietstar.reporting.run_facts import configuration, duration, machines
from quietstar.reporting.scales import DASH, number
from quietstar.runs.directory import RunDirectory, read_run
from quietstar.runs.files import REPORT, THOUGHTS, write_whole

ALWAYS = frozenset({"started", "finished"})
QUIET_EVENTS = ALWAYS | {"resumed", "interrupted", "saved"}
"""Events that are normal in any run."""
MOST_EVENTS = 100
SHOWN_OF_A_KIND = 4
Sample = Mapping[str, Any]


def write_report(run_directory: Path | str) -> Path:
    """Writes `report.html` into a run directory, even while the run is going: the file is whole at any moment.

    Args:
        run_directory: Directory of a run (`output_dir`). `config.yaml`, `metrics.jsonl`, `events.jsonl`, `samples/` and
            `environment.json` are read as far as they exist.

    Returns:
        Path of the page.

    Raises:
        DataError: The directory is not a run directory.
        OSError: The file cannot be written; an earlier one stays.
    """
    directory = Path(run_directory)
    path = directory / REPORT
    write_whole(path, train_report(read_run(directory), (directory / THOUGHTS).is_file()))
    return path


def train_report(run: RunDirectory, thoughts: bool = False) -> str:
    """Returns the page of a run as HTML; the same files give the same page, to the byte.

    Args:
        run: Files of the run as plain values.
        thoughts: Whether `thoughts.html` is in the directory of the page.
    """
    notable = [event for event in run.events if event.get("event") not in QUIET_EVENTS]
    marks = [(float(event["step"]), f"step {event['step']}: {event.get('event')}") for event in notable]
    curves = Curves(run.lines, marks)
    usual = asdict(TrainConfig()) | dict(TRAIN_PRESETS.get(str(run.config.get("preset")), {}))
    return page(
        f"{run.name} · training report",
        [
            _header(run),
            _events(run.events),
            section("Prediction", [panels(prediction_panels(curves))]),
            section(
                "By lookahead position",
                [panels(lookahead_panels(curves))],
                "A thought is judged by the tokens that follow it, each with the true tokens before it.",
            ),
            section("Thoughts", [panels(thought_panels(curves))]),
            _samples(run),
            _all_thoughts(run, thoughts),
            section("Optimisation", [panels(optimisation_panels(curves))]),
            section("Other measurements", [panels(curves.left_over())]),
            configuration(run.config, usual),
            machines(run.environment),
        ],
        "Written by quietstar from the files of the run. Curves of held-out text are strong, those of training faint; "
        "point at a chart for its numbers.",
    )


def _header(run: RunDirectory) -> str:
    config = run.config
    training = _group(config, "training")
    what = {"quietstar": "Quiet-STaR", "language_modeling": "language modelling"}
    method = str(training.get("method", "training"))
    words = [
        what.get(method, method),
        f"preset {config.get('preset')}" if config.get("preset") else "",
        str(_group(config, "model").get("path") or ""),
        str(_group(config, "data").get("path") or _group(config, "data").get("source") or ""),
    ]
    return header(run.name, words, _figures(run))


def _figures(run: RunDirectory) -> list[tuple[str, str, str]]:
    """Returns name, value and small print of the key figures."""
    training = [line for line in run.lines if line["split"] == "train"]
    held_out = [line for line in run.lines if line["split"] == "eval"]
    figures = []
    if run.lines:
        step, planned = run.lines[-1]["step"], _group(run.config, "training").get("steps")
        figures.append(
            ("Steps", number(step, 9), f"of {number(float(planned), 9)}" if isinstance(planned, int) else "")
        )
    if held_out:
        first, last = held_out[0], held_out[-1]
        for name, title in (
            ("base_nll", "Held-out NLL without thought"),
            ("talk_nll", "Held-out NLL with thought"),
            ("gain", "Gain of thoughts in nats"),
        ):
            if _is_number(last.get(name)):
                digits = 3 if name == "gain" else 4
                earlier = (
                    f"at step {first['step']}: {number(first[name], digits)}" if _is_number(first.get(name)) else ""
                )
                figures.append((title, number(last[name], digits), earlier if last is not first else ""))
        losses = [(line["loss"], line["step"]) for line in held_out if _is_number(line.get("loss"))]
        if losses:
            figures.append(("Smallest held-out loss", number(min(losses)[0]), f"at step {number(min(losses)[1], 9)}"))
    elif training and _is_number(training[-1].get("loss")):
        figures.append(("Training loss", number(training[-1]["loss"]), ""))
    figures += _special_tokens(run.config, training)
    if training and _is_number(training[-1].get("tokens_per_second")):
        figures.append(("Tokens a second", number(training[-1]["tokens_per_second"], 3), ""))
    if run.lines and _is_number(run.lines[-1].get("seconds")):
        figures.append(("Time", duration(run.lines[-1]["seconds"]), ""))
    return figures


def _special_tokens(config: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Returns the figure of special tokens' texts in the data, where there are any or they would be characters."""
    found = training[-1].get("special_tokens") if training else None
    count = float(found) if found is not None and _is_number(found) else 0.0
    meaning = _group(config, "data").get("special_tokens")
    if not count and meaning != "text":
        return []
    means = "read as characters" if meaning == "text" else "read as these tokens"
    return [("Texts of special tokens", number(count, 9), f"{means} (data.special_tokens)")]


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    if all(event.get("event") in ALWAYS for event in events):
        return ""
    counts = Counter(str(event.get("event", "")) for event in events)
    note = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sorted(counts.items()))
    latest = events[-MOST_EVENTS:]
    if len(latest) < len(events):
        note += f"; the last {len(latest)} are listed"
    rows = [
        [
            number(event["step"], 9),
            visible(str(event.get("event", "")).replace("_", " ")),
            visible(str(event.get("message", ""))),
        ]
        for event in latest
    ]
    marked = {index for index, event in enumerate(latest) if event.get("event") not in QUIET_EVENTS}
    listed = table(rows, ("step", "event", "what happened"), marked)
    return section("What happened", [listed if len(rows) <= 8 else details("All of it", listed)], note)


def _samples(run: RunDirectory) -> str:
    if not run.samples:
        return ""
    step, latest = run.samples[-1]
    first_step, first = run.samples[0]
    earlier = {} if first_step == step else {(one.get("text"), one.get("position")): one for one in first}
    by_reward = sorted((one for one in latest if _is_number(one.get("reward"))), key=lambda one: -one["reward"])
    shown: list[tuple[str, Sample]] = [("among the most rewarded", one) for one in by_reward[:SHOWN_OF_A_KIND]]
    shown += [("among the least rewarded", one) for one in by_reward[SHOWN_OF_A_KIND:][-SHOWN_OF_A_KIND:]]
    taken = {id(one) for _, one in shown}
    shown += [("at random", one) for one in [one for one in latest if id(one) not in taken][:SHOWN_OF_A_KIND]]
    cards = [_card(kind, one, earlier.get((one.get("text"), one.get("position"))), first_step) for kind, one in shown]
    note = (
        f"Held-out text, a thought at step {number(step, 9)}, and in bold how the text goes on. The places were drawn "
        f"at random, {len(latest)} of them; the reward counts all lookahead tokens, the NLLs the next token alone."
    )
    return section("Sampled thoughts", [readings(cards)], note)


def _all_thoughts(run: RunDirectory, made: bool) -> str:
    """Returns a note on where to see all thoughts about a whole text: a link, or the command that makes the page."""
    if made:
        link = f'<a href="{THOUGHTS}">{THOUGHTS}</a>'
        return f'<p class="note">All thoughts about a text, token by token, and what they gained: {link}</p>'
    if _group(run.config, "training").get("method") == "language_modeling":
        return ""
    directory = shlex.quote(str(run.config.get("output_dir") or run.name))
    command = f"python -m quietstar.view {directory} --text FILE"
    return f'<p class="note">All thoughts about a text, token by token: {visible(command)}</p>'


def _card(kind: str, sample: Sample, earlier: Sample | None, earlier_step: int) -> str:
    before, after = (f"<bdi>{visible(str(sample.get(name) or ''))}</bdi>" for name in ("before", "after"))
    compared = ""
    if earlier is not None:
        compared = f'<p class="earlier">At step {number(earlier_step, 9)}: {_thought(earlier)} {_facts(earlier)}</p>'
    text = f'<span class="before">{before}</span>{_thought(sample)}<span class="after">{after}</span>'
    return reading(kind, text, _facts(sample), compared)


def _thought(sample: Sample) -> str:
    thought = sample.get("thought")
    content = "pause" if thought is None else visible(str(thought), one_line=True)
    return f'<bdi class="inner">{content}</bdi>'


def _facts(sample: Sample) -> str:
    base, talk, weight = (_number_of(sample.get(name)) for name in ("base_nll", "talk_nll", "mixing_weight"))
    reward = _number_of(sample.get("reward"))
    sign = "+" if _is_number(sample.get("reward")) and sample["reward"] > 0 else ""
    return f"reward <b>{sign}{reward}</b> · next token NLL {base} → <b>{talk}</b> · weight {weight}"


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = config.get(name)
    return group if isinstance(group, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number_of(value: Any) -> str:
    return number(float(value), 3) if _is_number(value) else DASH
