"""`thoughts.html` and `thoughts.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quietstar.data.text_file import encode
from quietstar.errors import ConfigError, DataError
from quietstar.files import write_whole
from quietstar.model import QuietStarForCausalLM
from quietstar.reporting.environment import environment
from quietstar.reporting.viewer.measure import Progress, measure
from quietstar.reporting.viewer.options import ViewOptions
from quietstar.reporting.viewer.page import page
from quietstar.reporting.viewer.pieces import pieces, vocabulary
from quietstar.reporting.viewer.windows import overlap, window_size

VERSION = 1


def write_view(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    out: Path,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Writes the page of a text, and its data with the ending `.json` beside it; each file is whole at any moment.

    Args:
        model: The thinking model.
        tokenizer: Of its base.
        text: Anything with at least two tokens.
        out: The page, usually `thoughts.html`; its directory is made where it does not exist.
        progress: Called with the number of positions that are done, and of all.
        options: As in `ViewOptions`.

    Returns:
        The page.

    Raises:
        ConfigError: An option is unknown or out of range.
        DataError: The text is too short, or the tokenizer cannot encode it.
        OSError: A file cannot be written.
    """
    known = ViewOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigError(f"{name}: unknown, the options are {', '.join(known)}")
    return write_page(thoughts_of(model, tokenizer, text, ViewOptions(**options), progress), out)


def write_page(content: dict[str, Any], out: Path) -> Path:
    """Writes what `thoughts_of` gives; for the rest see `write_view`."""
    out = Path(out)
    data_file = out.with_suffix(".json")
    if data_file == out:
        raise ConfigError(f"out: got {out.name}, which is the name of the data; needs a name such as thoughts.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content, allow_nan=False, separators=(",", ":"))
    write_whole(data_file, data + "\n")
    write_whole(out, page(content["title"], data))
    return out


def thoughts_of(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    options: ViewOptions,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The content of `thoughts.json`; for the fields see `quietstar.reporting.viewer`, for the errors `write_view`."""
    config = model.config
    ids, cut = encode(text, tokenizer, options.tokens, options.text_name)
    _check_ids(ids, model.head.weight.shape[0], options.text_name)
    context = getattr(model.base.config, "max_position_embeddings", None)
    size = window_size(options.window, options.training_length, context, config.stream_length, config.lookahead)
    window = len(ids) if size is None else min(size, len(ids))
    one = options.greedy or config.thinking == "pause"
    count = options.thoughts or (1 if one else config.thoughts_per_position)
    temperature = config.temperature if options.temperature is None else options.temperature
    positions = measure(
        model,
        ids,
        thoughts=count,
        top_k=options.top_k,
        temperature=temperature,
        greedy=options.greedy,
        seed=options.seed,
        positions=options.positions,
        window=window,
        progress=progress,
    )
    texts = vocabulary(tokenizer, [*ids, *_ids_of(positions)])
    machine = environment()
    parameter = next(model.parameters())
    return {
        "version": VERSION,
        "title": f"{options.text_name} · thoughts of {options.model_name}",
        "model": {
            "name": options.model_name,
            "family": model.base.config.model_type,
            "vocabulary": int(model.head.weight.shape[0]),
            "thought_length": config.thought_length,
            "lookahead": config.lookahead,
            "interpolation": config.interpolation,
            "thinking": config.thinking,
        },
        "settings": {
            "thoughts": count,
            "top_k": options.top_k,
            "temperature": None if options.greedy else temperature,
            "seed": options.seed,
            "positions": options.positions,
            "tokens": options.tokens,
            "window": window,
            "overlap": overlap(window) if window < len(ids) else 0,
            "training_length": options.training_length,
            "device": parameter.device.type,
            "dtype": str(parameter.dtype).removeprefix("torch."),
        },
        "environment": {name: machine[name] for name in ("python", "packages", "git")},
        "text": {"name": options.text_name, "cut": cut, "tokens": ids, "pieces": pieces(ids, texts)},
        "vocabulary": texts,
        "positions": positions,
    }


def _check_ids(ids: Sequence[int], vocabulary_size: int, name: str) -> None:
    if max(ids) >= vocabulary_size:
        raise DataError(f"{name}: has token id {max(ids)}, but the model's vocabulary has {vocabulary_size} entries")


def _ids_of(positions: list[dict[str, Any]]) -> set[int]:
    """Every token id that is mentioned."""
    found: set[int] = set()
    for position in positions:
        listed = [*position["before"], *position.get("mean", ())]
        for thought in position["thoughts"]:
            listed += thought["after"]
            found.update(thought["tokens"] or ())
        found.update(token for token, _ in listed)
    return found
