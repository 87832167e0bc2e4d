"""Generating with thoughts: time for a new token, against the base's own `generate` and against running all anew.

    python benchmarks/generation.py

All sides continue the same random prompts greedily with the same weights, alternately in the same process:

- base: `model.base.generate`, transformers' own, with its cache;
- thoughts: `model.generate`, one thought of T tokens in front of every new token;
- entropy: the same where the base's prediction has more than x nats, x such that it is about a quarter of the tokens;
- never: `model.generate(think="never")`;
- no cache: `model(ids, logits_to_keep=1)` for every new token, the text and one thought behind it anew;
- every position: `model(ids)` for every new token, as the paper authors' zero-shot script does: a thought behind every
  token of the text, of which the last alone is used.

A clock among the stopping criteria reads the time when a token is there. The time of a step is that between the first
new token and the last, divided by the steps; up to the first it is the prompt's, given apart. The two sides without a
cache make fewer tokens (`--anew-tokens`, one where every position thinks). Time is CPU time of all threads on a CPU,
and on a GPU the clock's, read when the device is done. Given are medians of the repeats; ratios are taken within each
repeat, because a machine that others use is not always as fast.

Memory is the peak above the model, of a short run of its own: the process's resident set on a CPU, PyTorch's allocator
on a GPU.

    python benchmarks/generation.py --operators --against COMMIT

counts instead what the host does for one token of the tiny model, whose arithmetic takes next to no time: operators,
launches (those that compute or copy), the launches of a pass through a decoder layer, the launches that differ from
those of the token before, which a CUDA graph could not repeat, how often the host waits for a result, generators that
are made, and microseconds of CPU time. Other sides there: transformers' static cache; thoughts that are sampled, two at
each token; thoughts of a training step at one position of each text, where a token is one of a thought. With
`--against` the same is counted with the code of another commit, in processes that alternate with those of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, StoppingCriteria

from benchmarks.environment import ROOT, commit, markdown_table
from benchmarks.gpu_timing import CUT, Meter, card, resolve_device
from benchmarks.launches import Launches, changed
from benchmarks.script import Benchmark
from benchmarks.train_step import MEBIBYTE
from quietstar.model.modeling import QuietStarForCausalLM

BASE, THOUGHTS, ENTROPY, NEVER = "base", "thoughts", "entropy", "never"
NO_CACHE, EVERYWHERE = "no cache", "every position"
OWN_ALLOWANCE = 3
"""A token with a thought of T tokens may take T + 3 times the base's: T tokens, START, END, and one for the rest."""
BATCH_GROWTH = 16


@dataclass(frozen=True)
class Shape:
    """A Mistral with random weights.

    Args:
        repeats: Unless told otherwise.
        initializer_range: Large enough for predictions to differ in how sure they are. Small where there are many
            layers: random ones would add up bfloat16's rounding, and the base be taken for one that does not fit.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str = "float32"
    initializer_range: float = 0.05
    repeats: int = 3
    contexts: tuple[int, ...] = (256,)

    def build(self, device: torch.device) -> QuietStarForCausalLM:
        config = MistralConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            sliding_window=None,
            initializer_range=self.initializer_range,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        torch.manual_seed(0)
        with device:
            base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        return QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6]).eval()


MODELS = {
    "tiny": Shape(64, 128, 4, 4, 2, 256, repeats=11),
    "small": Shape(512, 1376, 8, 8, 2, 32000, contexts=(256, 1024)),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000, "bfloat16", 0.005, contexts=(256, 1024)),
}


@dataclass(frozen=True)
class Side:
    """One way to make tokens.

    Args:
        name: See above.
        thought_length: T; 0 where nothing is thought.
        think: Argument of `generate`.
    """

    name: str
    thought_length: int = 0
    think: str = "always"


@dataclass
class Reading:
    """Seconds of the prompt and of a step, and the share of tokens that were thought about."""

    prompt: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    share: float = 0.0
    peak_bytes: int = 0


class Clock(StoppingCriteria):
    """Reads the time when a token is there, and stops nothing."""

    def __init__(self, now: Callable[[], float], last: int) -> None:
        self._now = now
        self._last = last
        self._calls = 0
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._calls += 1
        if self._calls in (1, self._last):  # between them a GPU is not waited for
            self.times.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def clock_of(meter: Meter) -> Callable[[], float]:
    if not meter.on_gpu:
        return time.process_time

    def now() -> float:
        meter.synchronize()
        return time.perf_counter()

    return now


def take(side: Side, model: QuietStarForCausalLM, ids: Tensor, tokens: int, reading: Reading) -> None:
    """Makes so many new tokens in one way, and notes the time."""
    if side.thought_length:
        model.config.thought_length = side.thought_length
    now = clock_of(Meter(ids.device))
    begun = now()
    if side.name in (NO_CACHE, EVERYWHERE):
        keep = {"logits_to_keep": 1} if side.name == NO_CACHE else {}
        for _ in range(tokens):
            following = model(ids, **keep).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], dim=1)
        reading.step.append((now() - begun) / tokens)
        reading.share = 1.0
        return
    clock = Clock(now, tokens)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "stopping_criteria": [clock]}
    if side.name == BASE:
        model.base.generate(ids, **options)
    else:
        output = model.generate(ids, think=side.think, return_dict_in_generate=True, **options)
        reading.share = output.thinking.share if hasattr(output, "thinking") else 0.0
    first, last = clock.times
    reading.prompt.append(first - begun)
    reading.step.append((last - first) / (tokens - 1))


@torch.no_grad()
def quarter(model: QuietStarForCausalLM, ids: Tensor, tokens: int) -> float:
    """The nats that the base's prediction has more of at a quarter of the tokens that it makes itself."""
    text = model.base.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    logits = model.base(text).logits[:, ids.shape[1] - 1 : -1].float()
    logprobs = logits.log_softmax(-1)
    return float((-(logprobs.exp() * logprobs).sum(-1)).quantile(0.75))


def sides_of(
    model: QuietStarForCausalLM, ids: Tensor, tokens: int, lengths: Sequence[int], *, main: bool, others: bool
) -> Iterator[Side]:
    """What is compared for one batch; `main`: all lengths, `others`: everything besides base and thoughts."""
    middle = lengths[len(lengths) // 2]
    yield Side(BASE)
    for length in lengths if main else (middle,):
        yield Side(THOUGHTS, length)
    if others:
        yield Side(NEVER, think="never")
        yield Side(ENTROPY, middle, f"entropy>{quarter(model, ids, tokens)}")
        yield Side(NO_CACHE, middle)
        if len(ids) == 1 and main:
            yield from (Side(NO_CACHE, length) for length in lengths if length != middle)
            yield Side(EVERYWHERE, middle)


def compare(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """For each context and batch a row of each side: medians of the repeats."""
    shape = MODELS[name]
    model = shape.build(device)
    for context in [options.context] if options.context else shape.contexts:
        main = context == (options.context or shape.contexts[0])
        for batch in options.batches if main else options.batches[:1]:
            others = batch in (options.batches[0], options.batches[len(options.batches) // 2])
            generator = torch.Generator().manual_seed(batch)
            ids = torch.randint(0, shape.vocabulary, (batch, context), generator=generator).to(device)
            sides = list(sides_of(model, ids, options.tokens, options.thoughts, main=main, others=others))
            readings = {side: Reading() for side in sides}
            for side in sides:
                few = 1 if side.name == EVERYWHERE else 2
                call = partial(take, side, model, ids, few, Reading())
                readings[side].peak_bytes = Meter(device).peak_bytes(call)  # it warms up, too
            for repeat in range(options.repeats or shape.repeats):
                for side in sides if repeat % 2 == 0 else sides[::-1]:
                    tokens = {NO_CACHE: options.anew_tokens, EVERYWHERE: 1}.get(side.name, options.tokens)
                    take(side, model, ids, tokens, readings[side])
            base = readings[sides[0]].step
            rows: list[dict[str, Any]] = []
            for side, reading in readings.items():
                step = statistics.median(reading.step)
                rows.append(
                    {
                        **{"model": name, "context": context, "batch": batch, "side": side.name},
                        "thought_length": side.thought_length,
                        "share": reading.share,
                        "prompt_seconds": statistics.median(reading.prompt) if reading.prompt else "",
                        "step_seconds": step,
                        "tokens_per_second": batch / step,
                        "ratio_to_base": statistics.median(map(truediv, reading.step, base)),
                        "peak_mib": reading.peak_bytes / MEBIBYTE,
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
            yield rows


def claims(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What generation promises, and whether it was so."""
    found = []
    steps = {(r["model"], r["context"], r["side"], r["thought_length"], r["batch"]): r for r in rows}
    for (model, context, side, length, batch), row in steps.items():
        about = f"{model}, context {context}, T = {length}"
        if side != THOUGHTS:
            continue
        if batch == 1:
            ratio, limit = row["ratio_to_base"], length + OWN_ALLOWANCE
            verdict = "holds" if ratio <= limit else "FAILS"
            found.append(f"{about}: {ratio:.2f} times the base's time for a token, at most {limit}: {verdict}")
        alone = steps.get((model, context, side, length, 1))
        if batch == BATCH_GROWTH and alone is not None:
            growth = row["step_seconds"] / alone["step_seconds"]
            verdict = "holds" if growth < batch else "FAILS"
            found.append(
                f"{about}: a step of {batch} texts takes {growth:.1f} times that of one, below {batch}: {verdict}"
            )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Every measurement."""
    head = ["model", "side", "context", "batch", "T", "thought at, %", "prompt, ms", "step, ms", "tokens/s"]
    head += ["times the base's step", "peak MiB"]
    cells = [
        [
            *(row["model"], row["side"], str(row["context"]), str(row["batch"]), str(row["thought_length"] or "-")),
            f"{100 * row['share']:.0f}",
            f"{1000 * row['prompt_seconds']:.1f}" if row["prompt_seconds"] != "" else "-",
            f"{1000 * row['step_seconds']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio_to_base']:.2f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in rows
    ]
    return markdown_table(head, cells, text_columns=2)


# -- operators and host time -------------------------------------------------------------------------------------------

STATIC, SAMPLED, TRAINING = "base, static cache", "two sampled thoughts", "thoughts of training"
COUNTED = ("operators", "launches", "layer_launches", "changing", "waits", "generators")
FEW, MANY = 3, 11
"""New tokens of two runs whose difference is what a token costs; both texts end in the same block of columns."""


def calls_of(
    model: QuietStarForCausalLM, ids: Tensor, length: int, threshold: float
) -> dict[str, Callable[[int], object]]:
    """Each side as a function of the number of its tokens."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    last = torch.tensor([ids.shape[1] - 1])

    def static(tokens: int) -> object:
        return model.base.generate(ids, max_new_tokens=tokens, cache_implementation="static", **options)

    def thinking(tokens: int, **settings: Any) -> object:
        model.config.thought_length = length
        return model.generate(ids, max_new_tokens=tokens, **options, **settings)

    def training(tokens: int) -> object:
        model.config.thought_length = tokens
        return model.think(ids, anchors=last)

    return {
        BASE: lambda tokens: model.base.generate(ids, max_new_tokens=tokens, **options),
        STATIC: static,
        NEVER: partial(thinking, think="never"),
        THOUGHTS: thinking,
        SAMPLED: partial(thinking, thoughts_per_token=2, thought_temperature=1.0, seed=1),
        ENTROPY: partial(thinking, think=f"entropy>{threshold}"),
        TRAINING: training,
    }


def count(model: QuietStarForCausalLM, call: Callable[[int], object]) -> dict[str, float]:
    """What a token costs, in numbers that are the same each time."""
    few, many = Launches(), Launches()
    for launches, tokens in ((few, FEW), (many, MANY)):
        with launches.within(model):
            call(tokens)
    tokens = MANY - FEW
    passes = (many.layer_passes - few.layer_passes) / tokens
    names = ("operators", "launches", "waits", "generators")
    found = {name: (getattr(many, name) - getattr(few, name)) / tokens for name in names}
    steps = many.steps()
    return found | {
        "layer_launches": (many.layer_launches - few.layer_launches) / tokens / passes,
        "layer_passes": passes,
        "changing": statistics.median(len(changed(*pair)) for pair in pairwise(steps[1:])),
    }


def host_seconds(call: Callable[[int], object]) -> float:
    """CPU time of a token."""
    seconds = {}
    for tokens in (FEW, MANY):
        begun = time.process_time()
        call(tokens)
        seconds[tokens] = time.process_time() - begun
    return (seconds[MANY] - seconds[FEW]) / (MANY - FEW)


def measure_operators(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of each batch and side, of the code that is imported."""
    model, rows = MODELS["tiny"].build(torch.device("cpu")), []
    length = options.thoughts[len(options.thoughts) // 2]
    for batch in options.batches:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(0, MODELS["tiny"].vocabulary, (batch, options.context or 64), generator=generator)
        calls = calls_of(model, ids, length, quarter(model, ids, MANY))
        for call in calls.values():
            call(FEW)  # warms up
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.repeats or 5):
            for name, call in calls.items():
                seconds[name].append(host_seconds(call))
        for name, call in calls.items():
            about = {"batch": batch, "side": name, "thought_length": 0 if name in (BASE, STATIC, NEVER) else length}
            rows.append(about | count(model, call) | {"seconds": seconds[name]})
    return rows


def operators(options: argparse.Namespace, given: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of this commit's code and, with `--against`, of the other's, from processes that alternate."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {commit(): ROOT}
        if options.against:
            other = Path(folder) / "other"
            other.mkdir()
            archive = subprocess.run(["git", "archive", options.against], cwd=ROOT, check=True, stdout=subprocess.PIPE)
            subprocess.run(["tar", "x"], cwd=other, input=archive.stdout, check=True)
            shutil.rmtree(other / "benchmarks")
            shutil.copytree(ROOT / "benchmarks", other / "benchmarks")
            trees = {options.against: other} | trees
        found: dict[tuple[str, int, str], dict[str, Any]] = {}
        for turn in range(options.turns):
            for name, tree in list(trees.items())[:: 1 if turn % 2 == 0 else -1]:
                paths = os.pathsep.join([str(tree), str(tree / "kernels")])
                child = subprocess.run(
                    [sys.executable, str(tree / "benchmarks" / "generation.py"), *given, "--counted-here"],
                    env={**os.environ, "PYTHONPATH": paths},
                    check=True,
                    stdout=subprocess.PIPE,
                )
                for row in json.loads(child.stdout.splitlines()[-1]):
                    seconds = row.pop("seconds")
                    key = (name, row["batch"], row["side"])
                    known = found.setdefault(key, {"code": name, **row, "seconds": []})
                    known["seconds"] += seconds
        order = {name: place for place, name in enumerate(trees)}
        sides = [row["side"] for row in found.values()]
        rows = sorted(found.values(), key=lambda row: (row["batch"], sides.index(row["side"]), order[row["code"]]))
        return [{**row, "seconds": statistics.median(row["seconds"])} for row in rows]


def operators_table(rows: Sequence[dict[str, Any]]) -> str:
    head = [
        "side",
        "code",
        "batch",
        "T",
        "operators",
        "launches",
        "launches of a layer and pass",
        "launches that change",
    ]
    head += ["host waits", "generators", "host us", "host us of a layer and pass"]
    cells = [
        [row["side"], row["code"], str(row["batch"]), str(row["thought_length"] or "-")]
        + [f"{row[name]:.1f}" for name in COUNTED]
        + [f"{1e6 * row['seconds']:.0f}"]
        + [f"{1e6 * row['seconds'] / row['layer_passes']:.0f}"]
        for row in rows
    ]
    return markdown_table(head, cells, text_columns=2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="default: tiny small; on a GPU mistral-7b too")
    parser.add_argument("--device", default="auto")
    parser.add_threads()
    parser.add_argument("--thoughts", type=int, nargs="+", default=[4, 8, 16], metavar="T")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, help="tokens of the prompts; default: 256, and 1024 for one point")
    parser.add_argument("--tokens", type=int, default=9, help="new tokens of a run, two at least")
    parser.add_argument("--anew-tokens", type=int, default=2, help="the same for the side without a cache")
    parser.add_argument("--repeats", type=int, help="default: 3, of the tiny model 11")
    parser.add_results("--output-dir")
    parser.add_argument("--operators", action="store_true", help="count operators and host time instead")
    parser.add_argument("--against", metavar="COMMIT", help="with --operators: count those of its code too")
    parser.add_argument("--turns", type=int, default=3, help="with --operators: processes of each commit")
    parser.add_argument("--counted-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.begin(arguments)
    if options.operators:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if options.counted_here:
            print(json.dumps(measure_operators(options)))
            return
        found = operators(options, given)
        about = (
            f"For one token of every text of the batch: counts, and medians of CPU time with {options.threads} "
            f"thread(s). What is counted is said at the top of `benchmarks/generation.py`. The model: "
            + ", ".join(f"{key} {value}" for key, value in asdict(MODELS["tiny"]).items() if key != "contexts")
        )
        body = f"{about}\n\n{operators_table(found)}"
        parser.write(options.output_dir / "generation_operators", "Operators and host time of generation", body, found)
        return
    if options.tokens < 2:
        parser.error(f"--tokens: got {options.tokens}, needs at least 2: a step lies between two tokens")
    device = resolve_device(options.device)
    parser.device = str(device)
    names = options.model or ["tiny", "small", *(["mistral-7b"] if device.type == "cuda" else [])]
    rows: list[dict[str, Any]] = []
    shapes = [
        f"- {name}: {', '.join(f'{key} {value}' for key, value in asdict(MODELS[name]).items() if key != 'contexts')}"
        for name in names
    ]
    unit = "time until the GPU is done" if device.type == "cuda" else f"CPU time, {options.threads} thread(s)"
    introduction = (
        f"Greedy; {unit}; medians of alternating runs of {options.tokens} new tokens, "
        f"{options.anew_tokens} without a cache and one where every position thinks. A step makes a token for every "
        f"text of the batch. What is measured is said at the top of `benchmarks/generation.py`. Models with random "
        f"weights:\n\n" + "\n".join(shapes)
    )

    def body() -> str:
        return "\n\n".join([introduction, "\n".join(f"- {claim}" for claim in claims(rows)), table(rows)])

    out, title = options.output_dir / f"generation_{card(device)}", "Generating with thoughts"
    for name in names:
        for found in compare(name, options, device):
            rows += found
            parser.save(out, title, f"{CUT}\n\n{body()}", rows)
    parser.write(out, title, body(), rows)


if __name__ == "__main__":
    main()
