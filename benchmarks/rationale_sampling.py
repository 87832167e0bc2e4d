"""Sampling rationales: tokens per second of the outer loops' sampler and of plain `transformers.generate`.

    python benchmarks/rationale_sampling.py

Both sample the same number of completions of the same prompts, in the same batches, from the same model in the same
process, alternately: temperature 1, the same tokens at most, the same end-of-sequence token. `generate` pads on the
left and makes the k samples of a prompt with `num_return_sequences`. A completion's useful tokens are those up to the
end-of-sequence token; what either side computes behind it is work for nothing. The ratio is that of the medians.

Without `--model`, the model is a Phi with random weights, whose output bias gives the end-of-sequence token a
probability such that lengths vary as those of rationales do. Prompts are random words: `few-shot` has the lengths of
GSM8K's (six solved examples before each question), `addition` those of short sums.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar.config.sampling import SamplingOptions
from quietstar.data.tokenizer import load_tokenizer
from quietstar.model.loading import load_causal_lm
from quietstar.sampling.choice import make_sampler
from quietstar.sampling.requests import Request, sample_seed

OURS, PLAIN = "quietstar", "transformers.generate"
MEAN_LENGTH = 40


@dataclass(frozen=True)
class Setting:
    """Prompts of `few_shot` common words and `question[0]` to `question[1]` of their own, `samples` of each."""

    few_shot: int
    question: tuple[int, int]
    problems: int
    samples: int
    max_new_tokens: int


SETTINGS = {
    "few-shot, k = 8": Setting(900, (30, 100), 2, 8, 96),
    "few-shot, k = 1": Setting(900, (30, 100), 16, 1, 96),
    "addition, k = 8": Setting(0, (12, 24), 4, 8, 96),
    "addition, k = 1": Setting(0, (12, 24), 32, 1, 96),
}
TINY = {"tiny, k = 2": Setting(20, (2, 5), 3, 2, 8)}


@dataclass(frozen=True)
class Sampled:
    """What one side did: useful tokens, completions, seconds of the process's CPU time and of the clock."""

    tokens: int
    completions: int
    cpu_seconds: float
    seconds: float


def save_model(directory: Path, *, hidden: int, layers: int, vocabulary: int, mean_length: float) -> None:
    """A Phi with random weights and a tokenizer of so many words; texts end after `mean_length` tokens on average."""
    words = {"<end>": 0} | {f"w{index}": index for index in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(directory)
    config = PhiConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # nearly all words alike, so that the bias alone says when a text ends
        model.lm_head.bias.zero_()
        model.lm_head.bias[0] = math.log((vocabulary - 1) / (mean_length - 1))
    model.save_pretrained(directory)


def prompts_of(setting: Setting, words: Sequence[str], seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    shared = generator.choices(words, k=setting.few_shot)
    lengths = [generator.randint(*setting.question) for _ in range(setting.problems)]
    return [" ".join(shared + generator.choices(words, k=length)) for length in lengths]


def ours(sampler: Any, prompts: Sequence[str], setting: Setting, seed: int) -> tuple[int, int]:
    """Useful tokens and completions."""
    requests = [
        Request(prompt, sample_seed(seed, index, sample), f"problem {index}")
        for index, prompt in enumerate(prompts)
        for sample in range(setting.samples)
    ]
    found = [
        generation
        for batch in sampler.batches(requests)
        for generation in sampler.sample([requests[index] for index in batch])
    ]
    return sum(generation.tokens for generation in found), len(found)


def plain(model: Any, tokenizer: Any, prompts: Sequence[str], setting: Setting, batch_size: int) -> tuple[int, int]:
    """The same by `generate`, prompts of similar length together."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.split()))
    at_once = max(1, batch_size // setting.samples)
    tokens = completions = 0
    for start in range(0, len(ordered), at_once):
        inputs = tokenizer(ordered[start : start + at_once], return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            outputs = model.generate(
                **inputs.to(model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=setting.samples,
                max_new_tokens=setting.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        new = outputs[:, inputs["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).long().cumsum(-1)
        tokens += int(((ended == 0) | ((ended == 1) & (new == tokenizer.eos_token_id))).sum())
        completions += len(new)
        tokenizer.batch_decode(new, skip_special_tokens=True)
    return tokens, completions


def measure(call: Callable[[], tuple[int, int]], device: str) -> Sampled:
    begun, cpu_begun = time.perf_counter(), time.process_time()
    tokens, completions = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return Sampled(tokens, completions, time.process_time() - cpu_begun, time.perf_counter() - begun)


def compare(
    path: str, settings: dict[str, Setting], *, device: str, dtype: str, batch_size: int, repeats: int
) -> list[dict[str, object]]:
    """One row per setting and side: medians over the repeats."""
    tokenizer = load_tokenizer(path)
    model: Any = load_causal_lm(path, getattr(torch, dtype))
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    model.to(device).eval()
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    words = [word for word, token in sorted(vocabulary.items(), key=lambda item: item[1]) if token not in special]
    rows: list[dict[str, object]] = []
    for name, setting in settings.items():
        options = SamplingOptions(
            engine="transformers", temperature=1.0, max_new_tokens=setting.max_new_tokens, batch_size=batch_size
        )
        sampler = make_sampler(path, options, dtype=dtype, device=device)
        prompts = prompts_of(setting, words)
        found: dict[str, list[Sampled]] = {OURS: [], PLAIN: []}
        for repeat in range(repeats):
            torch.manual_seed(repeat)
            for side in (OURS, PLAIN) if repeat % 2 == 0 else (PLAIN, OURS):
                calls = {
                    OURS: partial(ours, sampler, prompts, setting, repeat),
                    PLAIN: partial(plain, model, tokenizer, prompts, setting, batch_size),
                }
                found[side].append(measure(calls[side], device))
                print(name, side, found[side][-1], file=sys.stderr, flush=True)
        sampler.close()
        for side, measured in found.items():
            rows.append(
                {
                    "setting": name,
                    "side": side,
                    "completions": measured[0].completions,
                    "tokens_per_completion": statistics.mean(m.tokens / m.completions for m in measured),
                    "tokens_per_second": statistics.median(m.tokens / m.seconds for m in measured),
                    "tokens_per_cpu_second": statistics.median(m.tokens / m.cpu_seconds for m in measured),
                    "seconds": statistics.median(m.seconds for m in measured),
                    "cpu_seconds": statistics.median(m.cpu_seconds for m in measured),
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """Both sides of each setting, and how many times as fast ours is by `measure`."""
    cells = []
    for mine, other in zip(rows[::2], rows[1::2], strict=True):
        for row in (mine, other):
            ratio = row[measure] / other[measure]
            cells.append(
                [
                    row["setting"],
                    row["side"],
                    str(row["completions"]),
                    f"{row['tokens_per_completion']:.1f}",
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['tokens_per_cpu_second']:.1f}",
                    f"{row['cpu_seconds']:.1f}",
                    f"{ratio:.2f}",
                ]
            )
    head = ["setting", "sampled by", "completions", "tokens each", "tokens/s", "tokens/CPU s", "CPU s", "times as fast"]
    return markdown_table(head, cells, text_columns=2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--model", help="directory or hub name; by default a random one, made on the spot")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=16, help="completions at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_threads()
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one tiny setting, to see that it runs")
    parser.add_out("rationale_sampling.md")
    options = parser.begin(arguments)
    sizes = (
        {"hidden": 64, "layers": 1, "vocabulary": 64}
        if options.tiny
        else {"hidden": 384, "layers": 4, "vocabulary": 16384}
    )
    with tempfile.TemporaryDirectory() as directory:
        if options.model is None:
            save_model(Path(directory), **sizes, mean_length=4 if options.tiny else MEAN_LENGTH)
        rows = compare(
            options.model or directory,
            TINY if options.tiny else SETTINGS,
            device=options.device,
            dtype=options.dtype,
            batch_size=options.batch_size,
            repeats=options.repeats,
        )
    name = options.model or (
        f"a Phi of {sizes['layers']} layers, hidden {sizes['hidden']}, vocabulary {sizes['vocabulary']}, random weights"
    )
    by = "tokens_per_second" if options.device.startswith("cuda") else "tokens_per_cpu_second"
    body = (
        f"Model: {name}, {options.dtype}; {options.batch_size} completions at once; medians of {options.repeats} "
        f"alternating runs. Times as fast: by {by.replace('_', ' ')}. What is counted is said at the top of "
        f"`benchmarks/rationale_sampling.py`.\n\n{table(rows, by)}"
    )
    parser.write(options.out, "Sampling rationales", body, rows)


if __name__ == "__main__":
    main()
