"""Sections of a page about the setup of a run: its options and its machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quietstar.reporting.page import details, facts, section, table, visible

_NOTHING = object()


def configuration(config: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """Returns the section of a run's options; those that differ from the defaults come first.

    Args:
        config: Options of the run, nested as in `config.yaml`.
        usual: Defaults of the options, nested or with dotted keys, with those of the run's preset applied.
    """
    flat = flatten(config)
    expected = flatten(usual) | {"preset": config.get("preset")}
    changed = [key for key, value in flat.items() if expected.get(key, _NOTHING) != value]
    rows = [
        [visible(key), option_html(flat[key]), option_html(expected[key]) if key in expected else ""] for key in changed
    ]
    everything = table([[visible(key), option_html(value)] for key, value in flat.items()])
    return section(
        "Configuration",
        [
            table(rows, ("option", "here", "by default")),
            details(f"All {len(flat)} options", everything),
        ],
        f"What differs from the defaults of preset {config.get('preset')}." if rows else "",
    )


def machines(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the section of the machines that a run used; empty without entries.

    Args:
        entries: Entries of `environment.json`, one for each start of the run.
    """
    if not entries:
        return ""
    earlier = "".join(_machine(entry) for entry in reversed(entries[:-1]))
    starts = "once" if len(entries) == 1 else f"{len(entries)} times; the last time is shown first"
    return section(
        "Environment",
        [_machine(entries[-1]), details("Earlier starts", earlier)],
        f"The run was started {starts}.",
    )


def _machine(entry: Mapping[str, Any]) -> str:
    packages, git = entry.get("packages"), entry.get("git")
    versions = (
        ", ".join(f"{name} {version}" for name, version in packages.items()) if isinstance(packages, dict) else ""
    )
    state = "not a checkout"
    if isinstance(git, dict):
        state = f"{git.get('commit')}{', with changes that are not committed' if git.get('dirty') else ''}"
    devices = entry.get("devices")
    found = {
        "command": entry.get("command"),
        "started": entry.get("started"),
        "git": state,
        "versions": ", ".join(filter(None, [f"python {entry.get('python', '')}", versions])),
        "GPU": ", ".join(map(str, devices)) if devices else "none",
        "CUDA": entry.get("cuda"),
        "CPU": f"{entry.get('cpu')}, {entry.get('cores')} cores, {entry.get('memory_gib')} GiB",
        "platform": entry.get("platform"),
    }
    return facts((name, fact) for name, fact in found.items() if fact)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested options by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def option_html(value: object) -> str:
    """Returns the value of an option as HTML, written as in `config.yaml`."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return visible(str(value)) if value != "" else "&ldquo;&rdquo;"


def duration(seconds: float) -> str:
    """Returns a duration in its two largest units, such as `1 h 20 min`."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (whole, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])
