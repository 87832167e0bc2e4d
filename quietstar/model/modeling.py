"""`QuietStarForCausalLM`: a base model that thinks before each prediction."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from quietstar.config.thinking import ThinkingOptions
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import ConfigError, DataError, UnsupportedBackboneError
from quietstar.model.attention import IMPLEMENTATION, AttentionPass
from quietstar.model.backbone import OutputHead, check_configuration, disable_dropout, output_head, probe_backbone
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.generation import ThinkingGeneration, one_cache, thinking_cache
from quietstar.model.heads import MixingHead, ThinkingGate, initial_output_bias
from quietstar.model.loading import load_causal_lm, load_configuration
from quietstar.model.padding import Padding, outside_inference, read_padding
from quietstar.model.passes import PAUSE, CachedPass, TalkStates, embed_stream, lookahead_tokens, talk_pass
from quietstar.model.thoughts import Prediction, Recording, Thoughts, base_entropy, expand_anchors
from quietstar.model.upstream import CACHE, Cache, CausalLMOutputWithPast, attention_implementation
from quietstar.model.upstream import initialization as init
from quietstar_kernels import linear_cross_entropy, sample_tokens
from quietstar_kernels.dispatch import check_backend

START, END = 0, 1
"""Rows of `thought_embedding`."""
PROBING = threading.RLock()
"""The probe changes a model's attention for a moment: threads that use one for the first time wait for each other."""
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "opt", "biogpt")
"""Families whose positions end where their table ends."""


class QuietStarForCausalLM(ThinkingGeneration, PreTrainedModel, GenerationMixin):  # named here for transformers' check
    """A causal language model that thinks before each prediction (Quiet-STaR, arXiv 2403.09629).

    Sub-modules: `base`, the unmodified transformers model; `thought_embedding`, the learned START and END vectors (rows
    0 and 1), which have no token id; `mixing_head`; `thinking_gate`, None unless the configuration asks for one.
    Dropout is switched off in the base: the states that sampled a thought must be those that are trained.

    Args:
        config: With the base's configuration as `text_config`.
        base: A loaded base model; without one it is built from `text_config` with fresh weights.

    Raises:
        UnsupportedBackboneError: The base would be silently wrong; the message names its family and the reason.
    """

    config: QuietStarConfig
    config_class = QuietStarConfig
    base_model_prefix = "base"
    # read where a user switches checkpointing on, and where an attention is chosen for the model as for its base
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # read where weights are loaded: parts whose name is here stay in float32
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
        self._probed = False
        self.post_init()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        # Not from the configuration, whose `temperature` is that of thoughts.
        self.generation_config = copy.deepcopy(base.generation_config)
        if config.banned_token_ids and self.generation_config is not None:
            self.generation_config.suppress_tokens = list(config.banned_token_ids)

    # -- building ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: Any = None,
        *,
        start_text: str | Sequence[int] = "---",
        end_text: str | Sequence[int] = "---",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> QuietStarForCausalLM:
        """Put an untrained thinking model around a base model.

        Args:
            base: A model id or directory that `AutoModelForCausalLM.from_pretrained` takes, or a loaded model.
            tokenizer: Turns `start_text` and `end_text` into tokens; loaded from `base` where that is a path.
            start_text: START begins as the mean embedding of this text's tokens (or of these token ids).
            end_text: The same for END.
            dtype: Of the weights where `base` is a path; by default that of the checkpoint.
            options: Fields of `QuietStarConfig`, e.g. `thought_length=16, lookahead=8`.

        Raises:
            ConfigError: `base` is not a model, a text has no tokens, or an option is unknown or out of range.
            UnsupportedBackboneError: The base would be silently wrong.
        """
        if isinstance(base, PreTrainedModel):
            model_base = base
        elif not isinstance(base, (str, os.PathLike)):
            raise ConfigError(
                f"base: got a {type(base).__name__}, needs a path or a transformers model; adapters are put on the "
                "thinking model afterwards, e.g. peft.get_peft_model(model, config)"
            )
        else:
            check_configuration(load_configuration(base))
            model_base = load_causal_lm(base, dtype)
            if tokenizer is None and (isinstance(start_text, str) or isinstance(end_text, str)):
                tokenizer = load_tokenizer(base)
        known = {*ThinkingOptions.__annotations__, *QuietStarConfig.__annotations__} - {"text_config"}
        for name in options:
            if name not in known:
                raise ConfigError(f"{name}: not an option of QuietStarConfig, which has {', '.join(sorted(known))}")
        model_base.config.dtype = model_base.dtype
        config = QuietStarConfig(text_config=model_base.config, **options)
        config.dtype = model_base.dtype
        model = cls(config, base=model_base)
        parameter = next(model_base.parameters())
        for part in model.thinking_parts:
            part.to(device=parameter.device, dtype=parameter.dtype)
        with torch.no_grad():
            for row, name, text in ((START, "start_text", start_text), (END, "end_text", end_text)):
                embed: Any = model_base.get_input_embeddings()
                ids = _token_ids(name, text, tokenizer, embed.weight.shape[0])
                vector = embed(torch.tensor(ids, device=parameter.device)).mean(0)
                model.thought_embedding.weight[row] = vector / config.embedding_scale
        model._probe_once()
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """As in transformers; a directory with adapters is put together from its base and what was trained.

        Args:
            pretrained_model_name_or_path: Directory or hub name.
            arguments, options: transformers' own. With adapters the weights have the type that they were trained in.

        Raises:
            CheckpointError: A part of a model with adapters is missing or damaged, or its base is not there.
        """
        from quietstar.model.adapters import is_adapter_checkpoint, load_finetuned  # which build on this module

        if not is_adapter_checkpoint(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        model = load_finetuned(pretrained_model_name_or_path)
        nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, nothing) if options.get("output_loading_info") else model

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As in transformers; of a model with adapters what is trained is written, and the name of its base.

        Args:
            save_directory: Made where it does not exist.
            arguments, options: transformers' own; with adapters only `state_dict` counts.
        """
        from quietstar.model.adapters import (
            has_adapters,
            save_finetuned,  # which builds on this module
        )

        if has_adapters(self):
            save_finetuned(self, save_directory, options.get("state_dict"))
        else:
            super().save_pretrained(save_directory, *arguments, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers asks for every module that holds parameters itself; the base's own initialise themselves.
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

    # -- parts that the passes and the objective use -------------------------------------------------------------------

    @property
    def thinking_parts(self) -> list[nn.Module]:
        """What the model has besides its base."""
        parts = (self.thought_embedding, self.mixing_head, self.thinking_gate)
        return [part for part in parts if part is not None]

    @property
    def decoder(self) -> nn.Module:
        """The base without its output head."""
        decoder = self.base.get_decoder()
        assert isinstance(decoder, nn.Module)
        return decoder

    @property
    def head(self) -> OutputHead:
        """The base's output head."""
        return output_head(self.base)

    @property
    def banned(self) -> tuple[int, ...]:
        """Tokens that no thought may contain."""
        return tuple(self.config.banned_token_ids or ())

    def thought_vectors(self) -> tuple[Tensor, Tensor]:
        """The input vectors of START and END, [E] each."""
        scaled = self.thought_embedding.weight * self.config.embedding_scale
        return scaled[START], scaled[END]

    def run_decoder(self, embeds: Tensor, position_ids: Tensor, thought_pass: AttentionPass) -> Tensor:
        """Final hidden states [B, N, E] of the N tokens that `thought_pass` lays out.

        Raises:
            UnsupportedBackboneError: The base's attention was replaced after this model was made.
            DataError: A position lies behind the base's learned ones.
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
        # A 4-D mask is handed on as it is, so transformers neither builds one nor takes the streams' repeated positions
        # for packed sequences; thought attention does not read it.
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

    def _prepare(self) -> None:
        """What can change between calls: adapters bring dropout of their own; weights arrive after the constructor."""
        disable_dropout(self.base)
        self._probe_once()

    def _probe_once(self) -> None:
        if self._probed or any(parameter.is_meta for parameter in self.parameters()):
            return
        with PROBING:
            if not self._probed:
                probe_backbone(self)
                self._probed = True

    def _fingerprint(self) -> tuple[object, ...]:
        """What a recording depends on besides its inputs; a write through `.data` alone can't be seen."""
        config = self.config
        weights = tuple((id(parameter), parameter.data_ptr(), parameter._version) for parameter in self.parameters())
        return (config.embedding_scale, config.thinking, config.thought_length, config.lookahead, *weights)

    @torch.no_grad()
    def choose_anchors(self, input_ids: Tensor, attention_mask: Tensor | None, anchors: Tensor | str | None) -> Tensor:
        """The positions that `think` would hang thoughts from, int32 [B, A], each once; for the arguments see there."""
        self._prepare()
        padding = read_padding(input_ids, attention_mask)
        entropy = None
        if isinstance(anchors, str) and anchors.startswith("entropy"):
            entropy = base_entropy(CachedPass(self, input_ids, padding, False).text_hidden, self.head)
        return expand_anchors(anchors, padding, entropy, 1)

    # -- thinking ------------------------------------------------------------------------------------------------------

    def think(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        anchors: Tensor | str | None = None,
        thoughts_per_position: int | None = None,
        tokens: Tensor | None = None,
        temperature: float | None = None,
        greedy: bool = False,
        seed: int = 0,
        first_text: int = 0,
        texts_in_step: int | None = None,
        record: bool = False,
    ) -> Thoughts:
        """Sample thoughts, without gradient (step 1 of a training step; section 4.2 of the paper).

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 0 for padding, which may be on the left, on the right or both, and 1 for text. Where
                rows hold several documents, text has the number of its document, 1, 2, ..., which never decreases: they
                see nothing of each other, as if each were a row.
            anchors: Positions that think: None for all but the last, `"every:N"`, `"entropy:K"` (the K at which the
                base is most uncertain; K a count or a fraction), or int [A] or [B, A]; see `expand_anchors`.
            thoughts_per_position: K; by default that of the configuration.
            tokens: int64 [B, P, T] thoughts to score instead of sampling.
            temperature: By default that of the configuration.
            greedy: Take the most probable token each time.
            seed: The same seed gives the same thoughts.
            first_text: Where these texts are part of a larger batch: the place of the first of them there. Their
                thoughts are then drawn with the random numbers that they would have had there.
            texts_in_step: Texts in the larger batch; by default `first_text` and these.
            record: Keep the pass for `learn(reuse_sampling_pass=True)`.

        Raises:
            DataError: A tensor has a wrong shape, or anchors lie outside the text.
            ConfigError: `anchors` is an unknown string, or an option is out of range.
        """
        batch = input_ids.shape[0]
        texts_in_step = first_text + batch if texts_in_step is None else texts_in_step
        if first_text < 0 or texts_in_step < first_text + batch:
            raise DataError(
                f"texts_in_step: got {texts_in_step}, needs at least first_text + the {batch} texts given = "
                f"{first_text + batch}, and first_text at least 0"
            )
        thoughts, cached, padding = self._think(
            input_ids,
            attention_mask,
            anchors,
            thoughts_per_position,
            tokens,
            temperature,
            greedy,
            seed,
            record,
            (first_text, texts_in_step),
        )
        if record:
            following = lookahead_tokens(input_ids, padding, thoughts.anchor, self.config.lookahead)
            with torch.no_grad():
                rest = embed_stream(self, thoughts.tokens, following)[:, :, self.config.thought_length :]
                cached.extend(rest)
            assert cached.record is not None
            mask = None if attention_mask is None else attention_mask.clone()
            inputs = (input_ids.clone(), mask, thoughts.tokens, thoughts.anchor)
            thoughts = replace(thoughts, recording=Recording(cached.record, self._fingerprint(), inputs))
        return thoughts

    @torch.no_grad()
    def _think(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        anchors: Tensor | str | None,
        thoughts_per_position: int | None,
        tokens: Tensor | None,
        temperature: float | None,
        greedy: bool,
        seed: int,
        record: bool,
        place: tuple[int, int] | None = None,
    ) -> tuple[Thoughts, CachedPass, Padding]:
        """Streams up to the input of the last thought token but one; END and what follows is the caller's."""
        self._prepare()
        config, head = self.config, self.head
        count = config.thoughts_per_position if thoughts_per_position is None else thoughts_per_position
        if count < 1:
            raise ConfigError(f"thoughts_per_position: got {count}, needs at least 1")
        temperature = config.temperature if temperature is None else temperature
        if not temperature > 0:
            raise ConfigError(
                f"temperature: got {temperature}, needs a value above 0; greedy=True takes the most probable"
            )
        padding = read_padding(input_ids, attention_mask)
        cached = CachedPass(self, input_ids, padding, record)
        entropy = None
        if isinstance(anchors, str) and anchors.startswith("entropy"):
            entropy = base_entropy(cached.text_hidden, head)
        anchor = outside_inference(expand_anchors(anchors, padding, entropy, count))
        batch, streams = anchor.shape
        length = config.thought_length
        if tokens is None and config.thinking == "pause":
            tokens = torch.full((batch, streams, length), PAUSE, dtype=torch.int64, device=input_ids.device)
        if tokens is not None and tokens.shape != (batch, streams, length):
            raise DataError(
                f"tokens: got shape {list(tokens.shape)}, needs {[batch, streams, length]} (texts, streams, T)"
            )
        cached.open_streams(anchor)
        head_options: dict[str, Any] = {
            "temperature": temperature,
            "banned": self.banned,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "backend": config.backend,
        }
        if tokens is not None:
            hidden = cached.extend(embed_stream(self, tokens, None)[:, :, :length])
            if config.thinking == "pause":
                logprob = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
            else:
                flat = hidden.flatten(0, 2)
                logprob = -linear_cross_entropy(flat, head.weight, tokens.flatten(), **head_options).view(tokens.shape)
            return Thoughts(tokens, anchor, logprob, count, temperature), cached, padding

        embed = self.base.get_input_embeddings()
        start, _ = self.thought_vectors()
        next_embeds = start.expand(batch, streams, 1, -1)
        sampled, logprobs = [], []
        first, total = place or (0, batch)
        for step in range(length):
            hidden = cached.extend(next_embeds).flatten(0, 2)
            token, logprob = sample_tokens(
                hidden,
                head.weight,
                seed=_step_seed(seed, step),
                rows=(first * streams, total * streams),
                greedy=greedy,
                **head_options,
            )
            sampled.append(token.view(batch, streams))
            logprobs.append(logprob.view(batch, streams))
            next_embeds = embed(sampled[-1])[:, :, None]
        tokens, logprob = torch.stack(sampled, -1), torch.stack(logprobs, -1)
        return Thoughts(tokens, anchor, logprob, count, temperature), cached, padding

    def talk(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        thoughts: Thoughts,
        *,
        reuse_sampling_pass: bool = True,
    ) -> TalkStates:
        """Differentiable hidden states of the text and of whole streams (step 2 of a training step).

        Args:
            input_ids: int64 [B, L], those that `thoughts` were made from.
            attention_mask: As in `think`.
            thoughts: What to think.
            reuse_sampling_pass: Take the layers' outputs from the pass that sampled the thoughts and recompute each
                layer in the backward pass. Thoughts without a recording, or with one that other weights or another text
                made, are run once without gradient first. The gradients are those of the plain pass.

        Raises:
            DataError: The thoughts do not fit the text or the configuration.
        """
        self._prepare()
        padding = read_padding(input_ids, attention_mask)
        self._check_thoughts(input_ids, thoughts)
        if not reuse_sampling_pass:
            return talk_pass(self, input_ids, padding, thoughts.tokens, thoughts.anchor, None)
        recording = thoughts.recording
        inputs = (input_ids, attention_mask, thoughts.tokens, thoughts.anchor)
        if recording is None or not recording.fits(self._fingerprint(), inputs):
            anchors = thoughts.anchor[:, :: thoughts.thoughts_per_position]
            recording = self.think(
                input_ids,
                attention_mask,
                anchors=anchors,
                thoughts_per_position=thoughts.thoughts_per_position,
                tokens=thoughts.tokens,
                record=True,
            ).recording
            assert recording is not None
        return talk_pass(self, input_ids, padding, thoughts.tokens, thoughts.anchor, recording.layers)

    def _check_thoughts(self, input_ids: Tensor, thoughts: Thoughts) -> None:
        streams = thoughts.anchor.shape[-1]
        wanted = (input_ids.shape[0], streams, self.config.thought_length)
        if thoughts.tokens.shape != wanted or thoughts.anchor.shape != wanted[:2]:
            raise DataError(
                f"thoughts: got tokens {list(thoughts.tokens.shape)} and anchors {list(thoughts.anchor.shape)}, "
                f"needs tokens {list(wanted)} (texts, streams, T) and anchors {list(wanted[:2])}"
            )
        count, length = thoughts.thoughts_per_position, input_ids.shape[1]
        if streams % count:
            raise DataError(f"thoughts: {streams} streams are not a multiple of {count} a position")
        if not streams:
            return
        anchor, tokens = thoughts.anchor, thoughts.tokens
        grouped = anchor.unflatten(1, (-1, count))
        if bool((grouped != grouped[..., :1]).any() | (anchor[:, 1:] < anchor[:, :-1]).any()):
            raise DataError(f"thoughts: anchors must not decrease, the {count} thoughts of a position side by side")
        if int(anchor.min()) < 0 or int(anchor.max()) >= length:
            raise DataError(
                f"thoughts: got anchors {int(anchor.min())}..{int(anchor.max())}, needs positions in the text, "
                f"0..{length - 1}"
            )
        lowest = PAUSE if self.config.thinking == "pause" else 0
        vocabulary = self.head.weight.shape[0]
        if int(tokens.min()) < lowest or int(tokens.max()) >= vocabulary:
            raise DataError(
                f"thoughts: got tokens {int(tokens.min())}..{int(tokens.max())}, needs {lowest}..{vocabulary - 1}"
            )

    # -- predicting ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        thoughts: Thoughts | None = None,
        anchors: Tensor | str | None = None,
        thoughts_per_position: int = 1,
        greedy: bool = True,
        seed: int = 0,
    ) -> Prediction:
        """The next token's prediction at each anchor, without and with a thought.

        Args:
            input_ids: int64 [B, L].
            attention_mask: As in `think`.
            thoughts: Thoughts to use instead of new ones.
            anchors: As in `think`; the last position may think too where it is given as a tensor.
            thoughts_per_position: Streams per anchor.
            greedy: Think the most probable tokens; otherwise sample with `seed`.
        """
        thoughts, hidden_base, hidden_thought, weight = self._end_thoughts(
            input_ids, attention_mask, thoughts, anchors, thoughts_per_position, greedy, seed
        )
        head = self.head
        talk_logits = head.mixed_logits(hidden_base, hidden_thought, weight, self.config.interpolation)
        return Prediction(head.logits(hidden_base), talk_logits, weight, thoughts)

    def _end_thoughts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        thoughts: Thoughts | None,
        anchors: Tensor | str | None,
        thoughts_per_position: int,
        greedy: bool,
        seed: int,
    ) -> tuple[Thoughts, Tensor, Tensor, Tensor]:
        """Thoughts, the hidden states [B, P, E] at the anchor and after END, and the mixing weight [B, P]."""
        if thoughts is None:
            thoughts, cached, _ = self._think(
                input_ids, attention_mask, anchors, thoughts_per_position, None, None, greedy, seed, False
            )
        else:
            if anchors is not None:
                raise ConfigError("anchors: can't be given together with thoughts, which have their own")
            self._check_thoughts(input_ids, thoughts)
            count = thoughts.thoughts_per_position
            made = self._think(
                input_ids, attention_mask, thoughts.anchor[:, ::count], count, thoughts.tokens, None, True, 0, False
            )
            cached = made[1]
        no_lookahead = input_ids.new_empty(*thoughts.anchor.shape, 0)
        ending = embed_stream(self, thoughts.tokens, no_lookahead)[:, :, self.config.thought_length :]
        hidden_thought = cached.extend(ending)[:, :, -1]
        index = thoughts.anchor.long()[..., None].expand(-1, -1, cached.text_hidden.shape[-1])
        hidden_base = cached.text_hidden.gather(1, index)
        return thoughts, hidden_base, hidden_thought, self.mixing_head(hidden_base, hidden_thought)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits with thoughts mixed in, so that any evaluator that calls the model measures the thinking model.

        Every kept position thinks greedily, so the same input gives the same logits. There is no gradient here: `learn`
        is the training step.

        Args:
            input_ids: int64 [B, L].
            attention_mask: As in `think`.
            labels: int64 [B, L]; with it `loss` is the cross entropy of `logits` with labels[:, 1:], -100 ignored.
            logits_to_keep: Only the last so many positions, all by default.
            past_key_values: The `ThinkingCache` of a call of `generate`, whose text `input_ids` go on with; only the
                last position is predicted then, and thinks as that call was asked to.
            cache: The same; transformers' name for it since 5.24.
            kwargs: What else transformers passes around (positions) is not used.

        Returns:
            `logits` float32 [B, L or logits_to_keep, V] and `loss`; with a cache [B, 1, V] and the cache.

        Raises:
            DataError: A tensor has a wrong shape.
            ConfigError: `logits_to_keep` together with labels, or a cache of another kind.
        """
        given = one_cache(past_key_values, cache)
        if given is not None:
            from quietstar.model.prediction import predict_next  # which builds on this module

            past = thinking_cache(given)
            if not past.is_open:
                past.open(input_ids, attention_mask)
            if past.index <= 0:  # once a call: it goes through all modules
                self._prepare()
            output: dict[str, Any] = {"logits": predict_next(self, input_ids, past)[:, None], CACHE: past}
            return CausalLMOutputWithPast(**output)
        read_padding(input_ids, attention_mask)
        length = input_ids.shape[1]
        kept = min(logits_to_keep, length) if logits_to_keep else length
        if labels is not None and kept < length:
            raise ConfigError(
                f"logits_to_keep: got {logits_to_keep} together with labels, which need all {length} positions"
            )
        positions = torch.arange(length - kept, length, device=input_ids.device)
        _, hidden_base, hidden_thought, weight = self._end_thoughts(
            input_ids, attention_mask, None, positions, 1, True, 0
        )
        logits = self.head.mixed_logits(hidden_base, hidden_thought, weight, self.config.interpolation)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % (1 << 63)


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


def _token_ids(name: str, text: str | Sequence[int], tokenizer: Any, vocabulary: int) -> list[int]:
    if not isinstance(text, str):
        ids = list(text)
    elif tokenizer is None:
        raise ConfigError(f"{name}: got the text {text!r} without a tokenizer; pass tokenizer= or token ids")
    else:
        try:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # tokenizers raises plain Exception, e.g. for a character that has no token
            raise ConfigError(f"{name}: the tokenizer can't encode {text!r}: {error}") from error
    if not ids:
        raise ConfigError(f"{name}: {text!r} has no tokens, needs at least one")
    if not all(0 <= token < vocabulary for token in ids):
        raise ConfigError(f"{name}: {text!r} has the token ids {ids}, the base has {vocabulary} tokens")
    return ids


AutoModelForCausalLM.register(QuietStarConfig, QuietStarForCausalLM, exist_ok=True)
