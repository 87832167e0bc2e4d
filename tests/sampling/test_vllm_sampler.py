"""What vLLM is asked, and what is made of its answer. It needs a GPU: a small engine of its interface stands in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quietstar.config.loops import SamplingOptions
from quietstar.errors import ConfigError, DataError
from quietstar.sampling.choice import make_sampler
from quietstar.sampling.requests import Completion, Request
from quietstar.sampling.transformers_sampler import TransformersSampler
from quietstar.sampling.vllm_sampler import ROUNDS, VllmSampler
from tests.model.tiny import make_base

ENGINE = '''
from types import SimpleNamespace

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    def __init__(self, **options):
        self.options, self.ended = options, False
        core = SimpleNamespace(shutdown=lambda: setattr(self, "ended", True))
        self.llm_engine = SimpleNamespace(engine_core=core)
        if options["dtype"] == "float64":
            raise ValueError("float64 is not\\nsupported")

    def generate(self, prompts, settings, use_tqdm=True):
        self.asked = list(zip(prompts, settings))
        return [SimpleNamespace(outputs=[self.complete(*one)]) for one in self.asked]

    def complete(self, prompt, setting):
        """The prompt once more, each token with a log-probability of -1 and a likelier one beside it."""
        tokens = prompt["prompt_token_ids"] + [2]
        entries = [{39: SimpleNamespace(logprob=-0.5), token: SimpleNamespace(logprob=-1.0)} for token in tokens]
        reason = "length" if len(tokens) >= setting.max_tokens else "stop"
        return SimpleNamespace(text="again", token_ids=tokens, logprobs=entries, finish_reason=reason)
'''
OPTIONS = SamplingOptions(engine="vllm", temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=4, batch_size=2)


@pytest.fixture
def directory(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    make_base("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/vllm.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    yield tmp_path / "model"
    sys.modules.pop("vllm", None)


def test_each_request_has_its_own_seed_and_raw_log_probabilities(directory: Path) -> None:
    sampler = make_sampler(directory, OPTIONS, dtype="bfloat16", device="cpu", stop=("\n\n",))
    assert isinstance(sampler, VllmSampler)
    engine = sampler._engine
    assert engine.options["logprobs_mode"] == "raw_logprobs" and engine.options["dtype"] == "bfloat16"
    asked = [Request("ABC", 7, "a"), Request("B", 8, "b"), Request("CD", 9, "c")]
    assert sampler.batches(asked) == [[1, 2, 0]]
    assert sampler.sample(asked) == [
        Completion("again", -4.0, 4, "length"),
        Completion("again", -2.0, 2, "stop"),
        Completion("again", -3.0, 3, "stop"),
    ]
    prompts, settings = zip(*engine.asked, strict=True)
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [[3, 4, 5], [4], [5, 6]]
    assert [setting.seed for setting in settings] == [7, 8, 9]
    first = settings[0]
    assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.7, 5, 0.9, 4)
    assert first.stop == ["\n\n"] and first.stop_token_ids == [2]
    sampler.close()
    assert engine.ended


def test_the_engine_gets_many_times_what_it_samples_at_once(directory: Path) -> None:
    """It waits for the longest row only at the end of what it got."""
    sampler = make_sampler(directory, OPTIONS, device="cpu")
    assert isinstance(sampler, VllmSampler)
    assert sampler._engine.options["max_num_seqs"] == OPTIONS.batch_size
    block = ROUNDS * OPTIONS.batch_size
    asked = [Request("ABC"[: 1 + index % 3], index, str(index)) for index in range(block + 3)]
    found = sampler.batches(asked)
    assert [len(batch) for batch in found] == [block, 3] and found == sampler.batches(asked)
    assert sorted(index for batch in found for index in batch) == list(range(block + 3))


def test_a_prompt_is_never_cut(directory: Path) -> None:
    sampler = make_sampler(directory, OPTIONS, device="cpu")
    with pytest.raises(DataError, match=r"long: its prompt of 61 tokens and the 4 .* context of 64"):
        sampler.sample([Request("A" * 61, 0, "long")])


def test_a_model_that_the_engine_refuses(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: vllm can't load it: float64 is not supported"):
        make_sampler(directory, OPTIONS, dtype="float64", device="cpu")


def test_auto_takes_transformers_without_a_gpu(directory: Path) -> None:
    options = SamplingOptions(engine="auto")
    assert isinstance(make_sampler(directory, options, device="cpu"), TransformersSampler)
