"""Configuration of a thinking model: the base model's own configuration plus how it thinks."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any, Self

from transformers import PreTrainedConfig

from quietstar.config.options import type_hints
from quietstar.config.parsing import check_type, shown
from quietstar.config.thinking import ThinkingOptions, check_thinking
from quietstar.errors import ConfigError, DataError


class QuietStarConfig(PreTrainedConfig, ThinkingOptions):
    """How a base model thinks: the options of `quietstar.config.thinking.ThinkingOptions`, and these.

    Args:
        text_config: Configuration of the base model, as an object or as its dict.
        banned_token_ids: Tokens that thoughts and `generate` never use, e.g. START and END where they have ids.
        thinking_gate: The model has a `ThinkingGate`, which predicts what a thought would gain, for
            `generate(think="learned")`. `python -m quietstar.gate` fits one and sets this.
        thinking_threshold: Predicted gain in nats above which `generate(think="learned")` thinks; the fit sets it to
            what keeps nearly all of the gain with the fewest thoughts, or beyond all predictions (never) where held-out
            texts do not surely gain.

    Raises:
        ConfigError: A value is out of range.
    """

    model_type = "quietstar"
    sub_configs = {"text_config": PreTrainedConfig}  # noqa: RUF012 (transformers reads it as a plain class attribute)

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    banned_token_ids: list[int] | None = None
    thinking_gate: bool = False
    thinking_threshold: float = 0.0

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Whoever has a configuration, an unpickled one too, may ask an Auto class for its model."""
        import_module("quietstar.model.modeling")  # which registers it
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        from transformers import CONFIG_MAPPING  # not imported with this module: see `quietstar.imports`

        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            family = fields.pop("model_type", None)
            if not isinstance(family, str) or family not in CONFIG_MAPPING:
                raise ConfigError(f"text_config.model_type: got {shown(family)}, needs a family that transformers has")
            self.text_config = CONFIG_MAPPING[family](**fields)
        if isinstance(self.text_config, PreTrainedConfig):
            # generate() and tied-weight discovery read these from the outer configuration.
            for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
                if kwargs.get(name) is None and hasattr(self.text_config, name):
                    kwargs[name] = getattr(self.text_config, name)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        if isinstance(self.banned_token_ids, tuple | set | range):
            self.banned_token_ids = list(self.banned_token_ids)
        own = {"banned_token_ids": list[int] | None, "thinking_gate": bool, "thinking_threshold": float}
        try:
            for name, hint in {**type_hints(ThinkingOptions), **own}.items():
                check_type(getattr(self, name), hint, name)
        except DataError as error:
            raise ConfigError(str(error)) from None
        check_thinking(self)
        if math.isnan(self.thinking_threshold):
            raise ConfigError("thinking_threshold: got nan, needs a number of nats")

    @property
    def stream_length(self) -> int:
        """S: START + thought tokens + END + lookahead - 1 teacher-forced tokens."""
        return self.thought_length + 2 + self.lookahead - 1
