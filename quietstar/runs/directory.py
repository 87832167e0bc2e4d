"""Reading the directory of a run, and checking the directory of a model that anybody may have written.

A run may still be going, or may have died in the middle of a line. A model's JSON files and links are checked before a
library reads them (`check_model_directory`), and what a library then refuses is traced to its field (`culprit`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from quietstar.config.options import Natural, NonNegative, Positive, Share, at_least, bounds, path_kind, type_hints
from quietstar.config.parsing import (
    MAX_JSON_BYTES,
    MAX_YAML_BYTES,
    NOT_REGULAR,
    check_type,
    open_file,
    parse_json,
    parse_yaml,
    read_json_file,
    read_lines,
    shown,
)
from quietstar.errors import CheckpointError, ConfigError, DataError
from quietstar.runs.checkpoints import read_json
from quietstar.runs.files import CONFIG, ENVIRONMENT, EVENTS, METRICS, SAMPLES

_SAMPLES_NAME = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True)
class RunDirectory:
    """A run's files as plain values.

    Args:
        name: Name of the directory.
        config: Options of the run, nested as in `config.yaml`; empty where it cannot be read.
        lines: Lines of `metrics.jsonl`: `step`, `split` and numbers, null as NaN.
        events: Lines of `events.jsonl`: `step`, `event` and `message`.
        samples: Step and samples of the first and the last file in `samples/`; one entry where there is one file.
        environment: Entries of `environment.json`, one for each start of the run.
    """

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    environment: list[dict[str, Any]] = field(default_factory=list)


def read_run(directory: Path) -> RunDirectory:
    """Reads a run directory; a file that is missing, and a line that is not whole, count as not written.

    Raises:
        DataError: It is not a run directory: neither `config.yaml` nor `metrics.jsonl` is there.
    """
    found = path_kind(directory, "run_directory")
    if found is None or not any((directory / name).is_file() for name in (CONFIG, METRICS)):
        raise DataError(f"{directory}: has neither config.yaml nor metrics.jsonl; needs the output_dir of a run")
    lines = [
        {key: math.nan if value is None else value for key, value in line.items()}
        for line in _json_lines(directory / METRICS)
        if is_metrics_line(line)
    ]
    last = int(lines[-1]["step"]) if lines else 0
    environment = _json(directory / ENVIRONMENT)
    return RunDirectory(
        name=directory.resolve().name,
        config=_config(directory / CONFIG),
        lines=lines,
        events=[
            line
            for line in _json_lines(directory / EVENTS)
            if isinstance(line.get("step"), int) and isinstance(line.get("event"), str)
        ],
        samples=_first_and_last_samples(directory / SAMPLES, last),
        environment=[entry for entry in environment if isinstance(entry, dict)]
        if isinstance(environment, list)
        else [],
    )


def is_metrics_line(line: object) -> bool:
    """Returns whether a value is a line of `metrics.jsonl`: a step, a split, and numbers or null."""
    if not isinstance(line, dict) or not isinstance(line.get("split"), str):
        return False
    try:
        check_type(line.get("step"), int, "step")
        check_type({key: value for key, value in line.items() if key != "split"}, dict[str, float | None], "line")
    except DataError:
        return False
    return True


def _config(path: Path) -> dict[str, Any]:
    try:
        with open_file(path) as file:
            config = parse_yaml(file.read(MAX_YAML_BYTES + 1), path.name)
    except (OSError, DataError):
        return {}
    return config if isinstance(config, dict) else {}


def _first_and_last_samples(directory: Path, last_step: int) -> list[tuple[int, list[dict[str, Any]]]]:
    found = {}
    for path in directory.glob("step-*.json"):
        if (match := _SAMPLES_NAME.fullmatch(path.name)) and int(match[1]) <= last_step:
            found[int(match[1])] = path  # later ones belong to a part of the run that is being repeated
    steps = sorted(found)
    ends = steps[:1] + steps[-1:] if len(steps) > 1 else steps
    read = [(step, _json(found[step])) for step in ends]
    return [
        (step, [one for one in content["samples"] if isinstance(one, dict) and isinstance(one.get("text", 0), int)])
        for step, content in read
        if isinstance(content, dict) and isinstance(content.get("samples"), list)
    ]


def _json(path: Path) -> Any:
    try:
        return read_json_file(path, surrogates=True)
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    with suppress(OSError, DataError), open_file(path) as file:
        for line in read_lines(file, MAX_JSON_BYTES):
            with suppress(ValueError):
                if line is not None and isinstance(content := parse_json(line, surrogates=True), dict):
                    lines.append(content)
    return lines


def run_of(checkpoint: Path) -> Path | None:
    """Returns the directory of the training run that a checkpoint lies in, or None."""
    if path_kind(checkpoint, "checkpoint") is None:
        return None
    # unresolved where possible, so that printed paths are as the user wrote them
    place = (checkpoint if checkpoint.parent.name == "checkpoints" else checkpoint.resolve()).parent
    return place.parent if place.name == "checkpoints" and (place.parent / CONFIG).is_file() else None


def model_name(checkpoint: Path) -> str:
    """Returns the name of a model for a report: not a path of this machine, but a hub name as it is."""
    run = run_of(checkpoint)
    if run is not None:
        return f"{run.resolve().name}, {checkpoint.resolve().name}"
    return checkpoint.resolve().name if path_kind(checkpoint, "checkpoint") == "directory" else str(checkpoint)


def training_length(checkpoint: Path) -> int | None:
    """Returns the number of tokens in the texts that a checkpoint was trained on; None where no run says so."""
    run = run_of(checkpoint)
    if run is None:
        return None
    try:
        length = _config(run / CONFIG)["data"]["length"]
    except (TypeError, KeyError):
        return None
    return length if isinstance(length, int) and not isinstance(length, bool) else None


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions"),
)
"""Fields of a model's configuration that are whole numbers of at least 1."""
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "intermediate_size")
MOST = {"num_hidden_layers": 10_000, "n_layer": 10_000}
"""Largest values of fields that make a list; other sizes are at most a thousand million."""
INDEX = "model.safetensors.index.json"
ADAPTERS = "adapter/adapter_config.json"
"""The file that makes a directory one of adapters, whose base lies elsewhere."""

TokenId = Annotated[int, at_least(-1)]  # -1 is widely used for no token
Least1 = Annotated[int, at_least(1)]


@dataclass(frozen=True)
class _TokenIds:
    """Fields of `config.json` and `generation_config.json` that transformers does not check for every family."""

    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None


@dataclass(frozen=True)
class _Config(_TokenIds):
    tie_word_embeddings: bool | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    attn_implementation: str | dict[str, Any] | None = None
    _attn_implementation: str | dict[str, Any] | None = None


@dataclass(frozen=True)
class _Generation(_TokenIds):
    """The fields of `generation_config.json` that have a meaning here."""

    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None
    bad_words_ids: list[list[int]] | None = None
    do_sample: bool | None = None
    temperature: NonNegative | None = None
    top_k: Natural | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Positive | None = None
    max_length: Least1 | None = None
    max_new_tokens: Least1 | None = None
    num_beams: Least1 | None = None
    num_return_sequences: Least1 | None = None
    no_repeat_ngram_size: Natural | None = None


def check_fields(file: Path, cls: type) -> dict[str, Any]:
    """Reads the object in a JSON file that another program may have written, and checks the fields that are known.

    Args:
        file: File to read.
        cls: Dataclass of the fields that the object may have, with their types and bounds; others pass.

    Raises:
        ConfigError: It is no JSON object, or a field has another type or is out of bounds.
    """
    try:
        value = read_json(file)
        check_type(value, cls, "")
        for name, hint in type_hints(cls, True).items():
            given = value.get(name)
            for one in given if isinstance(given, list) else (given,):
                for bound in bounds(hint) if one is not None else ():
                    bound.hold(name, one)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    except (DataError, ConfigError) as error:
        raise ConfigError(f"{file}: {error}") from None
    return value


def check_model_directory(path: str | os.PathLike[str]) -> None:
    """Checks the JSON files and the links of a local model directory, before it is loaded.

    Args:
        path: Directory of a model, a verifier, adapters or a tokenizer; what is no directory passes.

    Raises:
        ConfigError: `config.json` or `generation_config.json` cannot be used; the message names the field.
        CheckpointError: The index names a file that is none of the directory's own safetensors files, or a file is a
            link out of it, a pipe, a socket or a device; links to the files of the hub's cache are followed.
    """
    directory = Path(path)
    if path_kind(directory, "model.path") != "directory":
        return
    home = directory.resolve()
    # the hub's cache has the files of all snapshots in one place, unlike any other directory of this name
    places = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for file in sorted([*directory.iterdir(), *directory.glob("*/*")]):
        is_elsewhere = file.is_symlink() or file.parent != directory
        if is_elsewhere and not any(file.resolve().is_relative_to(place) for place in places):
            raise CheckpointError(f"{file}: is a link out of its directory, which is not followed; copy the file")
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise CheckpointError(f"{file}: {NOT_REGULAR}")
    if (directory / "adapter_config.json").exists():  # transformers would load the base that it names, from anywhere
        raise ConfigError(
            f"{directory / 'adapter_config.json'}: this is a directory of peft's adapters; needs a whole model: "
            "load base and adapters with peft, then merge_and_unload().save_pretrained(...)"
        )
    if (directory / "generation_config.json").exists():
        check_fields(directory / "generation_config.json", _Generation)
    if (directory / "config.json").exists():
        file = directory / "config.json"
        config = check_fields(file, _Config)
        quantized = config.get("quantization_config")
        if quantized is not None and not isinstance(quantized.get("quant_method"), str):
            got = shown(quantized.get("quant_method"))
            raise ConfigError(f"{file}: quantization_config.quant_method: got {got}, needs the name of a method")
        if "transformers_weights" in config:
            raise ConfigError(
                f"{file}: transformers_weights: got {shown(config['transformers_weights'])}, needs no such field: "
                f"weights are read from model.safetensors, or its parts with {INDEX}"
            )
        _check_sizes(file, "", config)
    if (directory / INDEX).exists():
        read_index(directory)


def read_index(directory: Path) -> list[str]:
    """Returns the names of the files that hold a model's weights, from their index.

    Raises:
        CheckpointError: The index cannot be read, or names what is no safetensors file of the directory.
    """
    index = directory / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map: needs an object of tensors and their files")
    for tensor, name in names.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map: {shown(tensor)}: got {shown(name)}, needs the name of a .safetensors file of "
                "this directory"
            )
        if path_kind(directory / name, f"{index}: weight_map") != "file":
            raise CheckpointError(f"{directory / name}: missing, but {INDEX} names it")
    return sorted(set(names.values()))


def _check_sizes(file: Path, prefix: str, config: dict[str, Any]) -> None:
    for name in SIZES:
        if name not in config or (config[name] is None and name in MAY_BE_NULL):
            continue
        value = config[name]
        if name in ("intermediate_size", "num_key_value_heads", "head_dim") and isinstance(value, list):
            continue  # one for each layer
        most = MOST.get(name, 10**9)
        if type(value) is not int or not 1 <= value <= most:
            needs = f"a whole number of at least 1 and at most {most:,}"
            raise ConfigError(f"{file}: {prefix}{name}: got {shown(value)}, needs {needs}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ConfigError(f"{file}: {prefix}model_type: got {kind!r}, needs the name of a family of models")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and not config.get("head_dim") and width % heads:
        raise ConfigError(
            f"{file}: {prefix}num_attention_heads: got {heads}, which does not divide hidden_size {width}"
        )
    groups = config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ConfigError(
            f"{file}: {prefix}num_key_value_heads: got {groups}, which does not divide num_attention_heads {heads}"
        )
    inner = config.get("text_config")
    if isinstance(inner, dict):
        _check_sizes(file, f"{prefix}text_config.", inner)
    elif inner is not None or (kind == "quietstar" and "text_config" in config and not _has_adapters(file)):
        raise ConfigError(f"{file}: {prefix}text_config: got {inner!r}, needs the object of the base's configuration")


def _has_adapters(file: Path) -> bool:
    return (file.parent / ADAPTERS).is_file()


MOST_TRIED = 200
"""Most fields of a file that `culprit` tries; each is a load."""


def culprit(directory: Path, names: Sequence[str], error: Exception, load: Callable[[Path], object]) -> str | None:
    """Finds the field that keeps a library from loading a directory: without it, the directory can be loaded.

    Args:
        directory: Directory that cannot be loaded.
        names: Names of the JSON files whose fields may be at fault; those that are not there are passed over.
        error: What the library raised; a field that it mentions is tried first.
        load: Function that loads a directory, without its weights; it may raise anything.

    Returns:
        The file, the field and its value in words, or None where no single field is at fault.
    """
    for name in names:
        try:
            content = read_json(directory / name)
        except CheckpointError:
            continue
        paths: list[tuple[str, ...]] = [
            (key, inner) for key, value in content.items() if isinstance(value, dict) for inner in value
        ]
        paths = [*paths[:100], *((key,) for key in content)]
        # sizes have been checked, and without its family a configuration is another one
        mentioned = str(error)
        paths.sort(key=lambda path: (path[-1] not in mentioned, path[-1] in (*SIZES, "model_type")))
        for path in paths[:MOST_TRIED]:
            rest = copy.deepcopy(content)
            inside = rest[path[0]] if len(path) > 1 else rest
            value = inside.pop(path[-1])
            with tempfile.TemporaryDirectory() as place:
                for file in directory.iterdir():
                    (Path(place) / file.name).symlink_to(file.resolve())
                (Path(place) / name).unlink()
                (Path(place) / name).write_text(json.dumps(rest), encoding="utf-8")
                with suppress(Exception):
                    load(Path(place))
                    return f"{directory / name}: {'.'.join(path)}: got {shown(value)}"
    return None
