"""`QuietStarForCausalLM`: a base model that thinks before each prediction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from quietstar.config.options import Count, Natural, Temperature, Whole, check_number
from quietstar.config.thinking import ThinkingOptions
from quietstar.config.training import Replay
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import ConfigError, DataError
from quietstar.model.adapters import assemble, has_adapters, is_adapter_checkpoint, save_finetuned
from quietstar.model.backbone import probe_once, replayed_products
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.generation import ThinkingGeneration, one_cache, thinking_cache
from quietstar.model.layers import LayerRecord
from quietstar.model.loading import check_weights, load_causal_lm, load_configuration, text_token_ids
from quietstar.model.padding import Padding, check_ids, outside_inference, read_padding
from quietstar.model.passes import PAUSE, CachedPass, TalkStates, embed_stream, lookahead_tokens, talk_pass
from quietstar.model.prediction import predict_next
from quietstar.model.thinking_model import END, START, ThinkingModel, check_configuration, disable_dropout
from quietstar.model.thoughts import Prediction, Recording, Thoughts, base_entropy, expand_anchors
from quietstar.model.upstream import CACHE, Cache, CausalLMOutputWithPast
from quietstar.runs.files import saving
from quietstar_kernels import linear_cross_entropy, sample_tokens
from quietstar_kernels.token_sampling import uniform_numbers

IGNORED = -100  # label of a position that has no loss


class QuietStarForCausalLM(ThinkingGeneration, ThinkingModel, GenerationMixin):  # named here for transformers' check
    """A causal language model that thinks before each prediction (Quiet-STaR, arXiv 2403.09629).

    Sub-modules: `base`, the unmodified transformers model; `thought_embedding`, the learned START and END vectors (rows
    0 and 1), which have no token id; `mixing_head`; `thinking_gate`, None unless the configuration asks for one.
    Dropout is switched off in the base: the states that sample a thought must be those that are trained.

    Args:
        config: Configuration of the thinking model, with that of the base as `text_config`.
        base: Loaded base model; None builds one from `text_config` with fresh weights.

    Raises:
        UnsupportedBackboneError: The base would be silently wrong; the message names its family and the reason.
    """

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
            base: Directory or hub name that `AutoModelForCausalLM.from_pretrained` takes, or a loaded model.
            tokenizer: Tokenizer for `start_text` and `end_text`; None loads it from `base` where that is a path.
            start_text: Text, or token ids, whose mean embedding START begins as.
            end_text: Text, or token ids, whose mean embedding END begins as.
            dtype: Dtype of the weights where `base` is a path; None takes that of the checkpoint.
            options: Fields of `QuietStarConfig`, such as `thought_length=16, lookahead=8`.

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
                ids = text_token_ids(name, text, tokenizer, embed.weight.shape[0])
                vector = embed(torch.tensor(ids, device=parameter.device)).mean(0)
                model.thought_embedding.weight[row] = vector / config.embedding_scale
        probe_once(model)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """Load a model as transformers does; one with adapters is assembled from its base and the trained weights.

        Args:
            pretrained_model_name_or_path: Directory or hub name.
            arguments, options: Arguments of transformers' method, but for those that would read pickles or run code.
                With adapters they are ignored but for `output_loading_info`: the weights have the dtype that they were
                trained in.

        Raises:
            CheckpointError: A part of a model with adapters is missing or damaged, or its base cannot be found.
        """
        if os.path.isdir(pretrained_model_name_or_path) and not options.get("subfolder"):
            check_weights(pretrained_model_name_or_path, load_configuration(pretrained_model_name_or_path))
        if not is_adapter_checkpoint(pretrained_model_name_or_path):
            options |= {"use_safetensors": True, "trust_remote_code": False}
            return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        model = assemble(cls, pretrained_model_name_or_path, None, False)
        nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, nothing) if options.get("output_loading_info") else model

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """Save a model as transformers does; with adapters, write only the trained weights and the base's name.

        Args:
            save_directory: Directory to write to, made where it does not exist.
            arguments, options: Arguments of transformers' method; with adapters only `state_dict` is used.
        """
        with saving(Path(save_directory)):
            if has_adapters(self):
                save_finetuned(self, save_directory, options.get("state_dict"))
            else:
                super().save_pretrained(save_directory, *arguments, **options)

    def _prepare(self) -> None:
        """Repeat what may be undone between calls: adapters bring dropout, and weights come after the constructor."""
        disable_dropout(self.base)
        probe_once(self)

    @torch.no_grad()
    def choose_anchors(
        self, input_ids: Tensor, attention_mask: Tensor | Padding | None, anchors: Tensor | str | None
    ) -> Tensor:
        """Return the positions where `think` would think, int32 [B, A], each once; it has the same arguments."""
        self._prepare()
        padding = read_padding(input_ids, attention_mask, self.embedding)
        entropy = None
        if isinstance(anchors, str) and anchors.startswith("entropy"):
            entropy = base_entropy(CachedPass(self, input_ids, padding).text_hidden, self.head)
        return expand_anchors(anchors, padding, entropy, 1)

    # -- thinking ------------------------------------------------------------------------------------------------------

    def think(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Padding | None = None,
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
        replay: Replay = "layers",
    ) -> Thoughts:
        """Sample thoughts, without gradient (step 1 of a training step; section 4.2 of the paper).

        Args:
            input_ids: Token ids of the texts, int64 [B, L].
            attention_mask: Mask of the texts, [B, L], or the `Padding` that `read_padding` made of it: 1 for text and 0
                for padding, on the left, on the right or both. Where rows hold several documents, text has the number
                of its document, 1, 2, ..., which never decreases; documents do not see each other.
            anchors: Positions that think: None for all but the last, `"every:N"`, `"entropy:K"` (the K at which the
                base is most uncertain; K a count or a fraction), or integers [A] or [B, A]; see `expand_anchors`.
            thoughts_per_position: Number K of thoughts at each position; None takes that of the configuration.
            tokens: Token ids of thoughts to score instead of sampling, int64 [B, P, T].
            temperature: Sampling temperature, above 0; None takes that of the configuration.
            greedy: Whether to take the most probable token each time instead of sampling.
            seed: Seed of the sampling; the same seed gives the same thoughts.
            first_text: Place of the first of these texts in a larger batch that they are part of. Thoughts are drawn
                with the random numbers that they would have in that batch.
            texts_in_step: Number of texts in the larger batch; None: the larger batch ends with these texts.
            record: Whether to keep the pass for `learn(reuse_sampling_pass=True)`.
            replay: What a kept pass holds besides the layers' outputs, as in `learn`.

        Raises:
            DataError: A tensor has a wrong shape, or anchors lie outside the text.
            ConfigError: `anchors` is an unknown string, or an option is out of range.
        """
        padding = read_padding(input_ids, attention_mask, self.embedding)
        self._prepare()
        layers = LayerRecord(replayed_products(self, replay), replay == "all") if record else None
        batch = input_ids.shape[0]
        texts_in_step = first_text + batch if texts_in_step is None else texts_in_step
        if first_text < 0 or texts_in_step < first_text + batch:
            raise DataError(
                f"texts_in_step: got {texts_in_step}, needs at least first_text + the {batch} texts given = "
                f"{first_text + batch}, and first_text at least 0"
            )
        place = (first_text, texts_in_step)
        thoughts, cached = self._think(
            input_ids, padding, anchors, thoughts_per_position, tokens, temperature, greedy, seed, layers, place
        )
        if layers is not None:
            following = lookahead_tokens(input_ids, padding, thoughts.anchor, self.config.lookahead)
            with torch.no_grad():
                rest = embed_stream(self, thoughts.tokens, following)[:, :, self.config.thought_length :]
                cached.extend(rest)
            mask = None if padding.attention_mask is None else padding.attention_mask.clone()
            inputs = (input_ids.clone(), mask, thoughts.tokens, thoughts.anchor)
            thoughts = replace(thoughts, recording=Recording(layers, self._fingerprint(), inputs))
        return thoughts

    @torch.no_grad()
    def _think(
        self,
        input_ids: Tensor,
        padding: Padding,
        anchors: Tensor | str | None,
        thoughts_per_position: int | None,
        tokens: Tensor | None,
        temperature: float | None,
        greedy: bool,
        seed: int,
        record: LayerRecord | None,
        place: tuple[int, int] | None = None,
    ) -> tuple[Thoughts, CachedPass]:
        """Sample or score thoughts. The streams end before the last thought token; the caller runs it and the rest."""
        self._prepare()
        config, head = self.config, self.head
        count = config.thoughts_per_position if thoughts_per_position is None else thoughts_per_position
        count, seed = check_number("thoughts_per_position", count, Count), check_number("seed", seed, Whole)
        temperature = config.temperature if temperature is None else temperature
        advice = "; greedy=True takes the most probable token"
        temperature = check_number("temperature", temperature, Temperature, advice)
        cached = CachedPass(self, input_ids, padding, record)
        entropy = None
        if isinstance(anchors, str) and anchors.startswith("entropy"):
            entropy = base_entropy(cached.text_hidden, head)
        anchor = outside_inference(expand_anchors(anchors, padding, entropy, count))
        batch, streams = anchor.shape
        length = config.thought_length
        if tokens is None and config.thinking == "pause":
            tokens = torch.full((batch, streams, length), PAUSE, dtype=torch.int64, device=input_ids.device)
        if tokens is not None:
            check_ids("tokens", tokens, self.embedding, PAUSE if config.thinking == "pause" else 0)
            if tokens.shape != (batch, streams, length):
                wanted = f"{[batch, streams, length]} (texts, streams, T)"
                raise DataError(f"tokens: got shape {list(tokens.shape)}, needs {wanted}")
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
            return Thoughts(tokens, anchor, logprob, count, temperature), cached

        embed = self.base.get_input_embeddings()
        start, _ = self.thought_vectors()
        next_embeds = start.expand(batch, streams, 1, -1).contiguous()  # like those of later steps
        sampled, logprobs = [], []
        uniform = None
        if not greedy:  # all numbers before the first token: a generator could not be part of a CUDA graph
            first, total = place or (0, batch)
            uniform = uniform_numbers(start, [seed * 1_000_003 + step for step in range(length)], total * streams)
            uniform = uniform[:, first * streams : (first + batch) * streams]
        for step in range(length):
            hidden = cached.extend(next_embeds).flatten(0, 2)
            numbers = None if uniform is None else uniform[step]
            token, logprob = sample_tokens(hidden, head.weight, uniform=numbers, greedy=greedy, **head_options)
            sampled.append(token.view(batch, streams))
            logprobs.append(logprob.view(batch, streams))
            next_embeds = embed(sampled[-1])[:, :, None]
        tokens, logprob = torch.stack(sampled, -1), torch.stack(logprobs, -1)
        return Thoughts(tokens, anchor, logprob, count, temperature), cached

    def talk(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Padding | None,
        thoughts: Thoughts,
        *,
        reuse_sampling_pass: bool = True,
        replay: Replay = "layers",
    ) -> TalkStates:
        """Compute differentiable hidden states of the text and of whole streams (step 2 of a training step).

        Args:
            input_ids: Token ids of the texts that `thoughts` were made from, int64 [B, L].
            attention_mask: Mask of the texts, [B, L], or their `Padding`, as in `think`; None: no padding.
            thoughts: Thoughts to run after each anchor.
            reuse_sampling_pass: Whether to take the layers' outputs from the pass that sampled the thoughts, and
                recompute each layer in the backward pass. Thoughts without a recording, or with one of other weights or
                another text, are run once without gradient first. The gradients are those of the plain pass.
            replay: What such a pass records, as in `learn`.

        Raises:
            DataError: The thoughts do not fit the text or the configuration.
        """
        self._prepare()
        padding = read_padding(input_ids, attention_mask, self.embedding)
        self._check_thoughts(input_ids, thoughts)
        if not reuse_sampling_pass:
            return talk_pass(self, input_ids, padding, thoughts.tokens, thoughts.anchor, None)
        recording = thoughts.recording
        inputs = (input_ids, padding.attention_mask, thoughts.tokens, thoughts.anchor)
        if recording is None or not recording.fits(self._fingerprint(), inputs):
            anchors = thoughts.anchor[:, :: thoughts.thoughts_per_position]
            recording = self.think(
                input_ids,
                padding,
                anchors=anchors,
                thoughts_per_position=thoughts.thoughts_per_position,
                tokens=thoughts.tokens,
                record=True,
                replay=replay,
            ).recording
            assert recording is not None
        return talk_pass(self, input_ids, padding, thoughts.tokens, thoughts.anchor, recording.layers)

    def _check_thoughts(self, input_ids: Tensor, thoughts: Thoughts) -> None:
        lowest = PAUSE if self.config.thinking == "pause" else 0
        thoughts.check(input_ids, self.config.thought_length, lowest, self.head.weight.shape[0])

    # -- predicting ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Padding | None = None,
        *,
        thoughts: Thoughts | None = None,
        anchors: Tensor | str | None = None,
        thoughts_per_position: int = 1,
        greedy: bool = True,
        seed: int = 0,
    ) -> Prediction:
        """Predict the next token at each anchor, without and with a thought.

        Args:
            input_ids: Token ids of the texts, int64 [B, L].
            attention_mask: Mask of the texts, [B, L], or their `Padding`, as in `think`; None: no padding.
            thoughts: Thoughts to use instead of new ones.
            anchors: Positions that think, as in `think`; a tensor may name the last position too.
            thoughts_per_position: Number K of new thoughts at each anchor.
            greedy: Whether thoughts take the most probable tokens; otherwise they are sampled with `seed`.
            seed: Seed of the sampled thoughts.

        Raises:
            DataError: A tensor has a wrong shape, anchors lie outside the text, or `thoughts` do not fit it.
            ConfigError: `anchors` is an unknown string, or given together with `thoughts`.
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
        attention_mask: Tensor | Padding | None,
        thoughts: Thoughts | None,
        anchors: Tensor | str | None,
        thoughts_per_position: int,
        greedy: bool,
        seed: int,
    ) -> tuple[Thoughts, Tensor, Tensor, Tensor]:
        """Return thoughts, the hidden states [B, P, E] at the anchor and after END, and the mixing weight [B, P]."""
        padding = read_padding(input_ids, attention_mask, self.embedding)
        if thoughts is None:
            thoughts, cached = self._think(
                input_ids, padding, anchors, thoughts_per_position, None, None, greedy, seed, None
            )
        else:
            if anchors is not None:
                raise ConfigError("anchors: can't be given together with thoughts, which have their own")
            self._check_thoughts(input_ids, thoughts)
            count = thoughts.thoughts_per_position
            _, cached = self._think(
                input_ids, padding, thoughts.anchor[:, ::count], count, thoughts.tokens, None, True, 0, None
            )
        no_lookahead = input_ids.new_empty(*thoughts.anchor.shape, 0)
        ending = embed_stream(self, thoughts.tokens, no_lookahead)[:, :, self.config.thought_length :]
        hidden_thought = cached.extend(ending)[:, :, -1]
        index = thoughts.anchor.long()[..., None].expand(-1, -1, cached.text_hidden.shape[-1])
        hidden_base = cached.text_hidden.gather(1, index)
        return thoughts, hidden_base, hidden_thought, self.mixing_head(hidden_base, hidden_thought)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits with thoughts mixed in, so that an evaluator that calls the model measures the thinking model.

        Every kept position thinks greedily, so the same input gives the same logits. There is no gradient: the training
        step is `quietstar.objective.learning.learn`.

        Args:
            input_ids: Token ids of the texts, int64 [B, L]; with a cache the tokens that it does not hold yet.
            attention_mask: Mask of the texts, [B, L], as in `think`; None: no padding.
            labels: Target token ids, int64 [B, L]; `loss` is the cross entropy of `logits` with labels[:, 1:], where
                -100 is ignored.
            logits_to_keep: Number of last positions to predict from; 0 keeps all.
            past_key_values: `ThinkingCache` of a call of `generate`, whose text `input_ids` continue. Then only the
                last position is predicted, and thinks as that call asked for.
            cache: Same as `past_key_values`, under the name that transformers uses since 5.24.
            kwargs: Other arguments of transformers, such as positions; ignored, but `inputs_embeds` is refused.

        Returns:
            `logits` float32 [B, L or logits_to_keep, V] and `loss`; with a cache, `logits` [B, 1, V] and the cache.

        Raises:
            DataError: A tensor has a wrong shape.
            ConfigError: `logits_to_keep` together with labels, or a cache of another kind.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ConfigError("inputs_embeds: not supported; thoughts are made from the text's token ids, input_ids")
        if input_ids is None:
            raise DataError("input_ids: missing, needs token ids")
        given = one_cache(past_key_values, cache)
        if given is not None:
            past = thinking_cache(given)
            if not past.is_open:
                past.open(input_ids, attention_mask)
            if past.index <= 0:  # once per call of `generate`, because it walks through all modules
                self._prepare()
            output: dict[str, Any] = {"logits": predict_next(self, input_ids, past)[:, None], CACHE: past}
            return CausalLMOutputWithPast(**output)
        padding = read_padding(input_ids, attention_mask, self.embedding)
        length = input_ids.shape[1]
        logits_to_keep = check_number("logits_to_keep", logits_to_keep, Natural)
        kept = min(logits_to_keep, length) if logits_to_keep else length
        if labels is not None and kept < length:
            raise ConfigError(
                f"logits_to_keep: got {logits_to_keep} together with labels, which need all {length} positions"
            )
        if labels is not None:
            targets = labels.masked_fill(labels == IGNORED, 0) if isinstance(labels, Tensor) else labels
            check_ids("labels", targets, self.embedding)
            if labels.shape != input_ids.shape:
                raise DataError(f"labels: got shape {list(labels.shape)}, needs that of input_ids")
        positions = torch.arange(length - kept, length, device=input_ids.device)
        _, hidden_base, hidden_thought, weight = self._end_thoughts(input_ids, padding, None, positions, 1, True, 0)
        logits = self.head.mixed_logits(hidden_base, hidden_thought, weight, self.config.interpolation)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


AutoModelForCausalLM.register(QuietStarConfig, QuietStarForCausalLM, exist_ok=True)
