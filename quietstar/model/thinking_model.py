"""The parts of a thinking model, and what the engine needs of its base model.

First come the base's output head, the families that are refused and the removal of dropout; then `ThinkingModel`: base,
START and END, mixing head and gate, and a pass through the base's decoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar.config.options import Count, check_number
from quietstar.errors import ConfigError, DataError, UnsupportedBackboneError
from quietstar.model.attention import IMPLEMENTATION, AttentionPass
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.heads import MixingHead, ThinkingGate, initial_output_bias
from quietstar.model.upstream import attention_implementation
from quietstar.model.upstream import initialization as init
from quietstar_kernels.dispatch import check_backend, compute_dtype
from quietstar_kernels.logits import LogitOptions, operand_dtype, raw_logits

RANDOM_IN_TRAINING = ("dropout", "layerdrop", "jitter")
"""Parts of the names of module attributes that are rates of random changes in training."""


@dataclass(frozen=True)
class OutputHead:
    """The output head of a base model, which makes logits of final hidden states: `softcap(logit_scale * lm_head h)`.

    Args:
        weight: Matrix of the head, [V, E].
        softcap: Soft cap of the logits, softcap * tanh(logits / softcap); None for no cap.
        logit_scale: Factor of the product with the matrix.
    """

    weight: Tensor
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., E], computed as the losses compute them.

        They are float32, or float64 for float64 states.
        """
        return self._logits(hidden, operand_dtype(self.weight, compute_dtype(hidden, self.weight), hidden))

    def mixed_logits(self, hidden_base: Tensor, hidden_thought: Tensor, weight: Tensor, interpolation: str) -> Tensor:
        """Return the mixed prediction whose loss `mixed_cross_entropy` gives, [..., V].

        Args:
            hidden_base: Hidden states without thought, [..., E].
            hidden_thought: Hidden states after the thought, [..., E].
            weight: Mixing weight of the thought, [...].
            interpolation: Quantity that the weight mixes: "logits" or "log_probs".
        """
        share = weight[..., None]
        if interpolation == "log_probs":
            base, thought = (self.logits(hidden).log_softmax(-1) for hidden in (hidden_base, hidden_thought))
            return torch.lerp(base, thought, share)
        dtype = compute_dtype(hidden_base, hidden_thought, share, self.weight)
        mixed = torch.lerp(hidden_base.to(dtype), hidden_thought.to(dtype), share.to(dtype))
        return self._logits(mixed, operand_dtype(self.weight, dtype, hidden_base, hidden_thought))

    def _logits(self, hidden: Tensor, operand: torch.dtype) -> Tensor:
        """Return logits whose product with the head has operands of dtype `operand`; see `raw_logits`."""
        raw = raw_logits(hidden.flatten(0, -2), self.weight.to(operand), compute_dtype(hidden, self.weight))
        options = LogitOptions(softcap=self.softcap, logit_scale=self.logit_scale)
        if raw.requires_grad:
            raw = options.transform(raw)
        else:
            options.transform_(raw)
        return raw.view(*hidden.shape[:-1], -1)


def check_configuration(config: PreTrainedConfig) -> None:
    """Refuse families that are known to be unsupported, before any weight is loaded.

    Raises:
        UnsupportedBackboneError: The family is unsupported; the message names it and the reason.
    """
    family = config.model_type
    if family == "quietstar":
        raise UnsupportedBackboneError(f"{family}: a thinking model already; load it with from_pretrained")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {value.get("rope_type") for value in rope.values() if isinstance(value, dict)} | {rope.get("rope_type")}
    changing = [kind for kind in ("dynamic", "longrope") if kind in kinds]
    if changing:
        raise UnsupportedBackboneError(
            f"{family}: its rotary frequencies depend on the longest position in a batch "
            f"({', '.join(changing)}), so a thought's keys would differ from pass to pass"
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedBackboneError(f"{family}: chunked attention is not supported by thought attention")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedBackboneError(f"{family}: an encoder-decoder model; Quiet-STaR needs a decoder-only causal LM")


def output_head(base: PreTrainedModel) -> OutputHead:
    """Return the output head of a base model.

    Raises:
        UnsupportedBackboneError: The head has a bias, or is not one matrix (quantised, or with an adapter).
    """
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise UnsupportedBackboneError(
            f"{base.config.model_type}: its lm_head is a {kind}, the fused loss needs a plain one (torch.nn.Linear)"
        )
    if head.bias is not None:
        raise UnsupportedBackboneError(
            f"{base.config.model_type}: its lm_head has a bias, which the fused loss does not support"
        )
    config: Any = base.config
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(head.weight, getattr(config, "final_logit_softcapping", None), scale)


def disable_dropout(base: nn.Module) -> None:
    """Set every dropout and router jitter to 0: the states that sample a thought must be those that are trained."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in RANDOM_IN_TRAINING):
                vars(module)[name] = 0.0


START, END = 0, 1
"""Rows of `thought_embedding`."""
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "opt", "biogpt")
"""Families with a table of learned positions, beyond which there are none."""


class ThinkingModel(PreTrainedModel):
    """A base model and the parts added to it for thinking, which passes over thought streams use.

    `QuietStarForCausalLM` is the class for users; it thinks, predicts and generates with these parts.

    Args:
        config: Configuration of the thinking model; its `text_config` is that of the base.
        base: Loaded base model; None builds one from `text_config` with fresh weights.

    Raises:
        UnsupportedBackboneError: Thoughts on this base would be silently wrong; the message names family and reason.
    """

    config: QuietStarConfig
    config_class = QuietStarConfig
    base_model_prefix = "base"
    # read when a user switches checkpointing on, and when an attention is chosen for the model and its base
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # read when weights are loaded: parts named here stay in float32
    _keep_in_fp32_modules_strict = ["thinking_gate"]  # noqa: RUF012 (transformers reads it as a plain class attribute)

    gathered_dtype: torch.dtype | None = None
    """Dtype that the weights are gathered in, where they lie in shards on several ranks."""

    known_fingerprint: str | None = None
    """`base_fingerprint` of the weights before they were cut into shards."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, of shards that which they are gathered in."""
        return self.gathered_dtype or super().dtype

    def __init__(self, config: QuietStarConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        text_config = config.text_config
        if not isinstance(text_config, PreTrainedConfig):
            raise ConfigError(
                "text_config: missing; it holds the configuration of the base model. A plain model's checkpoint has "
                "none: from_base(path) puts a model that learns to think around it, and transformers' "
                "AutoModelForCausalLM.from_pretrained(path).generate(...) continues texts with it as it is"
            )
        check_configuration(text_config)
        _check_options(config, text_config)
        if base is None:
            base = AutoModelForCausalLM.from_config(text_config)
        self.base: PreTrainedModel = base
        _use_thought_attention(base)
        disable_dropout(base)
        hidden_size = int(base.get_input_embeddings().weight.shape[1])  # type: ignore[index]  # a Tensor here
        self.thought_embedding = nn.Embedding(2, hidden_size)
        self.mixing_head = MixingHead(config, hidden_size)
        self.thinking_gate = ThinkingGate(hidden_size) if config.thinking_gate else None
        self.probed = False  # of `probe_once`
        self.fused: list[nn.Module] = []  # modules that `fuse_layers` has given other forwards
        self.value_uses: tuple[object, list[dict[str, bool]]] = ((), [])  # of `replayed_products`
        self.post_init()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        # not made from the configuration, where `temperature` is that of thoughts
        self.generation_config = copy.deepcopy(base.generation_config)
        if config.banned_token_ids and self.generation_config is not None:
            self.generation_config.suppress_tokens = list(config.banned_token_ids)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module that holds parameters itself; the base initialises its own
        if module is self.thought_embedding:
            init.normal_(self.thought_embedding.weight, std=0.02)
        elif module is self.mixing_head.output:
            init.zeros_(self.mixing_head.output.weight)
            if self.mixing_head.output.bias is not None:
                init.constant_(self.mixing_head.output.bias, initial_output_bias(self.config))
        elif isinstance(module, ThinkingGate):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    @property
    def thinking_parts(self) -> list[nn.Module]:
        """The parts of the model besides its base."""
        parts = (self.thought_embedding, self.mixing_head, self.thinking_gate)
        return [part for part in parts if part is not None]

    @property
    def decoder(self) -> nn.Module:
        """The base model without its output head."""
        decoder = self.base.get_decoder()
        assert isinstance(decoder, nn.Module)
        return decoder

    @property
    def head(self) -> OutputHead:
        """The output head of the base model."""
        return output_head(self.base)

    @property
    def embedding(self) -> Tensor:
        """The table of the base's token embeddings, [V, E]."""
        weight = self.base.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids of the tokens that no thought may contain."""
        return tuple(self.config.banned_token_ids or ())

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give the base another number of tokens: its embeddings, its output head and its configuration.

        START and END have no token ids, so their vectors stay.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: Arguments of transformers' method.

        Returns:
            The base's embeddings.

        Raises:
            ConfigError: The number is below 1 or would drop a token of `banned_token_ids`, or the base has adapters,
                whose checkpoint holds no embeddings.
        """
        if getattr(self.base, "peft_config", None):
            raise ConfigError(
                "resize_token_embeddings: the base has adapters, whose checkpoint holds no embeddings; "
                "merge_adapters(model) first, or resize before add_adapters"
            )
        if new_num_tokens is not None:
            new_num_tokens = check_number("new_num_tokens", new_num_tokens, Count)
        if pad_to_multiple_of is not None:
            pad_to_multiple_of = check_number("pad_to_multiple_of", pad_to_multiple_of, Count)
        if new_num_tokens is not None and max(self.banned, default=-1) >= new_num_tokens:
            raise ConfigError(f"new_num_tokens: got {new_num_tokens}, but banned_token_ids has {max(self.banned)}")
        embeddings: nn.Embedding = self.base.resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing=mean_resizing
        )
        assert isinstance(self.config.text_config, PreTrainedConfig)
        self.config.text_config.vocab_size = self.base.config.vocab_size
        return embeddings

    def thought_vectors(self) -> tuple[Tensor, Tensor]:
        """Return the input vectors of START and END, [E] each."""
        scaled = self.thought_embedding.weight * self.config.embedding_scale
        return scaled[START], scaled[END]

    def _fingerprint(self) -> tuple[object, ...]:
        """Return what a recording depends on besides its inputs; only a write through `.data` stays unseen."""
        config = self.config
        weights = tuple((id(parameter), parameter.data_ptr(), parameter._version) for parameter in self.parameters())
        device = self.device.type
        precision = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        settings = (config.embedding_scale, config.thinking, config.thought_length, config.lookahead)
        return (*settings, *precision, *weights)

    def run_decoder(
        self, embeds: Tensor, position_ids: Tensor, thought_pass: AttentionPass, last_position: int | None = None
    ) -> Tensor:
        """Run the decoder on the N tokens that `thought_pass` lays out.

        Args:
            embeds: Embeddings of the tokens, [B, N, E].
            position_ids: Positions of the tokens, int64 [B or 1, N].
            thought_pass: Layout of the tokens: which of them see which.
            last_position: Largest of the positions; None reads it, for which the host waits, where it is checked.

        Returns:
            Hidden states after the final norm, [B, N, E].

        Raises:
            UnsupportedBackboneError: The base's attention was replaced after this model was made.
            DataError: A position lies beyond the base's learned ones.
        """
        config = self.base.config
        implementation = attention_implementation(config)
        if implementation != IMPLEMENTATION:
            raise UnsupportedBackboneError(
                f"{config.model_type}: its attention is now {implementation!r}, under which streams would "
                f"see everything; set it back with base.set_attn_implementation({IMPLEMENTATION!r})"
            )
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and config.model_type in LEARNED_POSITIONS:
            last = int(position_ids.max()) if last_position is None else last_position
            if last >= limit:
                raise DataError(
                    f"input_ids: a thought would reach position {last}, "
                    f"the base has {limit} learned positions; use a shorter text"
                )
        # transformers passes a 4-D mask on unchanged: it neither builds one nor takes the streams' repeated positions
        # for packed sequences. Thought attention does not read it.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
        output = self.decoder(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=False,
            thought_pass=thought_pass,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def _check_options(config: QuietStarConfig, text_config: PreTrainedConfig) -> None:
    try:
        check_backend(config.backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for token in config.banned_token_ids or ():
        if not 0 <= token < text_config.vocab_size:
            raise ConfigError(f"banned_token_ids: got {token}, the base has {text_config.vocab_size} tokens")
    if len(set(config.banned_token_ids or ())) == text_config.vocab_size:
        raise ConfigError("banned_token_ids: got every token of the base, needs to leave one")
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and config.stream_length > longest:
        raise ConfigError(
            f"thought_length: got {config.thought_length}, with lookahead {config.lookahead} that is longer than the "
            f"{longest} positions of the base"
        )


def _use_thought_attention(base: PreTrainedModel) -> None:
    reason = "its layers do not use transformers' attention interface"
    try:
        base.set_attn_implementation(IMPLEMENTATION)
    except (KeyError, ValueError) as error:
        raise UnsupportedBackboneError(f"{base.config.model_type}: {reason} ({error})") from error
    if attention_implementation(base.config) != IMPLEMENTATION:
        raise UnsupportedBackboneError(f"{base.config.model_type}: {reason}")
