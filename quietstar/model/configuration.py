"""Configuration of a thinking model: the base model's own configuration plus how it thinks."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, Self

from transformers import PreTrainedConfig

from quietstar.errors import ConfigError
from quietstar_kernels.backends import BACKENDS

Interpolation = Literal["logits", "log_probs"]
MixingActivation = Literal["identity", "sigmoid"]
Thinking = Literal["sample", "pause"]


class QuietStarConfig(PreTrainedConfig):
    """How a base model thinks before each token (Quiet-STaR, arXiv 2403.09629, sections 4.1-4.4).

    Args:
        text_config: Configuration of the base model, as an object or as its dict.
        thought_length: Sampled tokens of a thought, START and END not counted.
        lookahead: True tokens that a thought is trained on (the paper's "tokens ahead").
        thoughts_per_position: Thoughts sampled at each position in training (K).
        interpolation: `"logits"` mixes logits (the authors' code: `softmax(w z_thought + (1-w) z_base)`); `"log_probs"`
            mixes log-probabilities (the paper's equation in section 4.3).
        mixing_activation: What turns the mixing head's output into the weight w of the thought: `"identity"` (the
            authors', unbounded) or `"sigmoid"`.
        initial_mixing_weight: The weight w of an untrained model. `None` is the authors' head: no output bias and
            exactly zero (a half under `"sigmoid"`). At w = 0 every reward and every gradient of START and END is
            exactly zero, so that learning starts only after the mixing head alone has moved; a small positive weight
            avoids that.
        embedding_scale: START and END are their embedding rows times this. The authors use 100 so that Adam moves them
            100 times faster; with 1 the trainer gives them a learning rate of their own instead.
        thinking: `"sample"` thinks in sampled tokens; `"pause"` repeats START in their place (a control without
            content).
        temperature: Sampling temperature of thoughts, above 0.
        banned_token_ids: Tokens that thoughts and `generate` never use, e.g. START and END where they have ids.
        backend: Kernel backend, see `quietstar_kernels`.
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
    thought_length: int = 8
    lookahead: int = 4
    thoughts_per_position: int = 2
    interpolation: str = "logits"
    mixing_activation: str = "identity"
    initial_mixing_weight: float | None = 0.1
    embedding_scale: float = 1.0
    thinking: str = "sample"
    temperature: float = 1.0
    banned_token_ids: list[int] | None = None
    backend: str = "auto"
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
            self.text_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        if isinstance(self.text_config, PreTrainedConfig):
            # generate() and tied-weight discovery read these from the outer configuration.
            for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
                if kwargs.get(name) is None and hasattr(self.text_config, name):
                    kwargs[name] = getattr(self.text_config, name)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self._check()

    def _check(self) -> None:
        for name in ("thought_length", "lookahead", "thoughts_per_position"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needs at least 1")
        for name in ("temperature", "embedding_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needs a value above 0")
        for name, allowed in (
            ("interpolation", ("logits", "log_probs")),
            ("mixing_activation", ("identity", "sigmoid")),
            ("thinking", ("sample", "pause")),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, needs one of {', '.join(allowed)}")
        weight = self.initial_mixing_weight
        if weight is not None and self.mixing_activation == "sigmoid" and not 0 < weight < 1:
            raise ConfigError(f"initial_mixing_weight: got {weight}, a sigmoid needs a value between 0 and 1")

    @property
    def stream_length(self) -> int:
        """S: START + thought tokens + END + lookahead - 1 teacher-forced tokens."""
        return self.thought_length + 2 + self.lookahead - 1
