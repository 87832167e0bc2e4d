"""Sampling through vLLM, where it is installed."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.config.loops import SamplingOptions
from quietstar.data.examples import end_of_sequence
from quietstar.data.tokenizer import encode_prompt, load_tokenizer
from quietstar.errors import ConfigError
from quietstar.model.loading import (
    LOADING_ERRORS,
    check_weights,
    ending_tokens,
    load_configuration,
    load_generation_config,
)
from quietstar.sampling.requests import Completion, Request, batches_by_length, check_lengths

ROUNDS = 64
"""Batches of `batch_size` requests that the engine gets at once. It starts a request where another has ended, so rows
wait for the longest only at the end of them all. A killed run loses the requests that were not finished."""


def has_vllm() -> bool:
    """Returns whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


class VllmSampler:
    """Samples from a model with vLLM's engine, which frees its memory when the sampler is closed.

    Log-probabilities are the raw ones (`logprobs_mode`): of the model itself, before temperature, top-k and top-p. Each
    request has its own seed. vLLM schedules the rows itself, so a repeated run may round differently; the environment
    variable VLLM_BATCH_INVARIANT=1 of vLLM prevents that on GPUs that support it.

    Args:
        path: Directory or hub name of the model and its tokenizer.
        options: Sampling options, such as the temperature and the batch size.
        dtype: Dtype of the weights, such as `bfloat16`.
        stop: Strings that end a completion, besides the end-of-sequence token.

    Raises:
        ConfigError: vLLM is not installed or cannot load the model.
    """

    def __init__(
        self, path: str | os.PathLike[str], options: SamplingOptions, *, dtype: str, stop: Sequence[str] = ()
    ) -> None:
        if not has_vllm():
            raise ConfigError("sampling.engine: vllm is not installed; pip install 'quietstar[vllm]', or use auto")
        self.options = options
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        self._stop = [text for text in stop if text]
        end_of_sequence(self.tokenizer)
        whole = load_configuration(path)
        check_weights(path, whole)
        config = whole.get_text_config()
        self._ending = sorted(ending_tokens(self.tokenizer, config.vocab_size, load_generation_config(path), config))
        self._context = getattr(config, "max_position_embeddings", None)
        self._vllm: Any = importlib.import_module("vllm")
        try:
            self._engine: Any = self._vllm.LLM(
                model=os.fspath(path),
                dtype=dtype,
                seed=0,
                max_num_seqs=options.batch_size,
                enable_prefix_caching=True,
                generation_config="vllm",  # no defaults of the model: only the options say how to sample
                logprobs_mode="raw_logprobs",
                trust_remote_code=False,
                load_format="safetensors",  # by default it reads pickles too
            )
        except LOADING_ERRORS as error:
            raise ConfigError(f"{os.fspath(path)}: vllm can't load it: {' '.join(str(error).split())}") from error

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Returns the indices of requests that the engine gets together, shortest prompts first.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
        """
        return batches_by_length(self._encode(requests), ROUNDS * self.options.batch_size)

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Samples completions of one batch, in its order.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
        """
        prompts = [{"prompt_token_ids": prompt} for prompt in self._encode(requests)]
        settings = [
            self._vllm.SamplingParams(
                seed=request.seed,
                temperature=self.options.temperature,
                top_p=self.options.top_p,
                top_k=self.options.top_k,
                max_tokens=self.options.max_new_tokens,
                stop=self._stop,
                stop_token_ids=self._ending,
                logprobs=1,  # those of the sampled token and of the most probable one
                skip_special_tokens=True,
            )
            for request in requests
        ]
        outputs = self._engine.generate(prompts, settings, use_tqdm=False)
        return [generation(output.outputs[0]) for output in outputs]

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        engine, self._engine = self._engine, None
        shutdown = getattr(getattr(getattr(engine, "llm_engine", None), "engine_core", None), "shutdown", None)
        if shutdown is not None:
            shutdown()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        known: dict[str, list[int]] = {}
        for request in requests:
            if request.prompt not in known:
                known[request.prompt] = encode_prompt(self.tokenizer, request.prompt)
        prompts = [known[request.prompt] for request in requests]
        check_lengths(requests, prompts, self.options.max_new_tokens, self._context)
        return prompts


def generation(output: Any) -> Completion:
    """Converts a `CompletionOutput` of vLLM."""
    tokens = list(output.token_ids)
    logprob = sum(entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True))
    return Completion(output.text, logprob, len(tokens), "length" if output.finish_reason == "length" else "stop")
