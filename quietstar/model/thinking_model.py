"""The parts of a thinking model: base, START and END, mixing head and gate, and a pass through the base's decoder."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quietstar.errors import ConfigError, DataError, UnsupportedBackboneError
from quietstar.model.attention import IMPLEMENTATION, AttentionPass
from quietstar.model.backbone import OutputHead, check_configuration, disable_dropout, output_head
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.heads import MixingHead, ThinkingGate, initial_output_bias
from quietstar.model.upstream import attention_implementation
from quietstar.model.upstream import initialization as init
from quietstar_kernels.dispatch import check_backend

START, END = 0, 1
"""Rows of `thought_embedding`."""
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "opt", "biogpt")
"""Families with a table of learned positions, beyond which there are none."""


class ThinkingModel(PreTrainedModel):
    """A base model and the parts added to it for thinking: what passes over thought streams use.

    `QuietStarForCausalLM` is the class for users; it thinks, predicts and generates with these parts.

    Args:
        config: Configuration of the thinking model, with that of the base as `text_config`.
        base: Loaded base model; None builds one from `text_config` with fresh weights.

    Raises:
        UnsupportedBackboneError: The base would be silently wrong; the message names its family and the reason.
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
        hidden_size = int(base.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        self.thought_embedding = nn.Embedding(2, hidden_size)
        self.mixing_head = MixingHead(config, hidden_size)
        self.thinking_gate = ThinkingGate(hidden_size) if config.thinking_gate else None
        self.probed = False
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
    def banned(self) -> tuple[int, ...]:
        """Ids of the tokens that no thought may contain."""
        return tuple(self.config.banned_token_ids or ())

    def thought_vectors(self) -> tuple[Tensor, Tensor]:
        """Return the input vectors of START and END, [E] each."""
        scaled = self.thought_embedding.weight * self.config.embedding_scale
        return scaled[START], scaled[END]

    def run_decoder(self, embeds: Tensor, position_ids: Tensor, thought_pass: AttentionPass) -> Tensor:
        """Run the decoder on the N tokens that `thought_pass` lays out.

        Args:
            embeds: Embeddings of the tokens, [B, N, E].
            position_ids: Positions of the tokens, int64 [B or 1, N].
            thought_pass: Layout of the tokens: which of them see which.

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
            last = int(position_ids.max())
            if last >= limit:
                raise DataError(
                    f"input_ids: a thought would reach position {last}, "
                    f"the base has {limit} learned positions; use a shorter text"
                )
        # transformers passes a 4-D mask on as it is: it neither builds one nor takes the streams' repeated positions
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


def _use_thought_attention(base: PreTrainedModel) -> None:
    reason = "its layers do not use transformers' attention interface"
    try:
        base.set_attn_implementation(IMPLEMENTATION)
    except (KeyError, ValueError) as error:
        raise UnsupportedBackboneError(f"{base.config.model_type}: {reason} ({error})") from error
    if attention_implementation(base.config) != IMPLEMENTATION:
        raise UnsupportedBackboneError(f"{base.config.model_type}: {reason}")
