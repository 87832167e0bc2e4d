"""One DPO step of the engine against that of TRL's trainer: time and peak memory, same model, same pairs.

    python benchmarks/dpo_step.py

A step is the loss of one batch of pairs and its gradients; the reference's log-probabilities are known before, on every
side. Four sides, one model, built from one seed:

* `engine`: `quietstar.verifiers.dpo.dpo_step`, a pair in a row, log-probabilities fused with the head;
* `engine_checkpointed`: the same with gradient checkpointing;
* `trl`: `trl.DPOTrainer.training_step` with `precompute_ref_log_probs`, without gradient checkpointing;
* `trl_checkpointed`: the same with it, which is TRL's default;
* `logits`: the textbook's way, log-softmax over all logits of transformers' own forward.

First a check: loss and all gradients of every side must agree. Then each measurement runs in a process of its own. On a
CPU (Linux) the time is CPU time of the process and the memory is the peak of the resident set above what it is once the
model is built and a step on short pairs has loaded what torch loads lazily, gradients included; on CUDA the time is
that of events on the stream and the memory that of torch's allocator. Needs `trl`.

TRL's head works in tiles of 4,096 tokens by 32,768 entries of the vocabulary, with a Triton kernel on GPUs alone: on a
CPU plain operations make copies of each tile, and prompts are scored too. A CPU says little of what it takes on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import markdown_table, version
from benchmarks.script import Benchmark, WithDefaults
from benchmarks.train_step import MEBIBYTE, Conditions, answer_of, cpu_meter, cuda_meter, difference, prepare

# torch is imported where a measurement needs it and not here: the parent only waits, and should take no memory (or GPU)
# from the child that it measures.

SIDES = ("engine", "engine_checkpointed", "trl", "trl_checkpointed", "logits")
BETA = 0.1
LIMIT = 1e-3
"""Largest relative difference of losses and gradients between two sides."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Pairs and the model that they are for."""

    pairs: int
    prompt: int
    completion: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int


# ---------------------------------------------------------------------------------------------- the sides, in a child


def build(shape: Shape, conditions: Conditions) -> tuple[Any, Any]:
    """A llama from the seed, and a tokenizer with a token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(shape.vocabulary - 1)} | {"<end>": shape.vocabulary - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(conditions.seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=shape.vocabulary - 1,
        attn_implementation="sdpa",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, conditions.dtype))
    return model.to(conditions.device), tokenizer


def texts(shape: Shape, seed: int) -> list[dict[str, str]]:
    """Pairs of random words; a completion ends with a token more. Lengths differ: from half of the most to the most."""
    import random

    rng = random.Random(seed)

    def words(count: int) -> str:
        return "".join(f" w{rng.randrange(shape.vocabulary - 1)}" for _ in range(count))

    def length(number: int, most: int) -> int:
        return most if number == 0 else rng.randint(most // 2, most)

    return [
        {
            "prompt": words(shape.prompt),
            "chosen": words(length(number, shape.completion - 1)),
            "rejected": words(length(number, shape.completion - 1)),
        }
        for number in range(shape.pairs)
    ]


class EngineStep:
    """What `train_dpo` has its trainer compute."""

    def __init__(self, side: str, shape: Shape, conditions: Conditions) -> None:
        from quietstar.model.modeling import QuietStarForCausalLM
        from quietstar.training.finetuning import set_gradient_checkpointing
        from quietstar.verifiers.dpo import dpo_step

        base, self.tokenizer = build(shape, conditions)
        self.model = QuietStarForCausalLM.from_base(base, start_text=[0], end_text=[0])
        set_gradient_checkpointing(self.model, side.endswith("_checkpointed"))
        self.model.train()
        self.device, self.step = conditions.device, dpo_step(BETA)

    def batch(self, pairs: list[dict[str, str]]) -> Any:
        import torch

        from quietstar.data.batches import Batch
        from quietstar.verifiers.dpo import reference_logprobs
        from quietstar.verifiers.pairs import Pair, encode_pairs, rows_of

        named = [Pair("", pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
        rows = rows_of(encode_pairs(self.tokenizer, named))
        values = reference_logprobs(self.model, rows, 1)
        batch = Batch(rows.tokens, rows.attention_mask, (), loss_mask=rows.loss_mask, values=values)
        return batch.to(torch.device(self.device))

    def run(self, batch: Any) -> float:
        loss = self.step(self.model, batch, 0).loss
        loss.backward()
        return float(loss.detach())

    def parameters(self) -> dict[str, Any]:
        return dict(self.model.base.named_parameters())


class TrlStep:
    """What `trl.DPOTrainer.train` does between the batch and the optimizer."""

    def __init__(self, side: str, shape: Shape, conditions: Conditions) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        model, self.tokenizer = build(shape, conditions)
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=self.folder.name,
                per_device_train_batch_size=shape.pairs,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=1,
                gradient_checkpointing=side.endswith("_checkpointed"),
                beta=BETA,
                max_length=None,
                bf16=False,  # the parameters themselves have the type that is measured
                use_cpu=conditions.device == "cpu",
                disable_tqdm=True,
                report_to=[],
            ),
            train_dataset=Dataset.from_list(
                [pair for own in (shape, warm_up(shape)) for pair in texts(own, conditions.seed)]
            ),
            processing_class=self.tokenizer,
        )
        self.model = self.trainer.model
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = 1

    def batch(self, pairs: list[dict[str, str]]) -> Any:
        known = {row["chosen"].removesuffix("<end>"): row for row in self.trainer.train_dataset}
        return self.trainer.data_collator([known[pair["chosen"]] for pair in pairs])

    def run(self, batch: Any) -> float:
        return float(self.trainer.training_step(self.model, batch))

    def parameters(self) -> dict[str, Any]:
        return dict(self.model.named_parameters())


class LogitsStep(EngineStep):
    """Both completions of all pairs padded to one length, and a log-softmax over their logits."""

    def __init__(self, side: str, shape: Shape, conditions: Conditions) -> None:
        self.model, self.tokenizer = build(shape, conditions)
        self.device = conditions.device

    def batch(self, pairs: list[dict[str, str]]) -> Any:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from quietstar.data.examples import encode_example

        examples = [
            encode_example(self.tokenizer, pair["prompt"], pair[which])
            for which in ("chosen", "rejected")
            for pair in pairs
        ]
        tokens = pad_sequence([torch.tensor(example.tokens) for example in examples], batch_first=True)
        lengths = torch.tensor([len(example) for example in examples])[:, None]
        starts = torch.tensor([example.prompt_length for example in examples])[:, None]
        place = torch.arange(tokens.shape[1])
        mask, learned = place < lengths, (place >= starts) & (place < lengths)
        batch = [tensor.to(self.device) for tensor in (tokens, mask, learned)]
        with torch.no_grad():
            return *batch, torch.cat(
                [self.logprobs(*(tensor[[row]] for tensor in batch)) for row in range(len(tokens))]
            )

    def logprobs(self, tokens: Any, mask: Any, learned: Any) -> Any:
        logprobs = (
            self.model(tokens, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float().log_softmax(-1)
        )
        return (logprobs.gather(2, tokens[:, 1:, None]).squeeze(2) * learned[:, 1:]).sum(1)

    def run(self, batch: Any) -> float:
        from torch.nn.functional import logsigmoid

        *inputs, reference = batch
        right, wrong = (self.logprobs(*inputs) - reference).chunk(2)
        loss = -logsigmoid(BETA * (right - wrong)).mean()
        loss.backward()
        return float(loss.detach())

    def parameters(self) -> dict[str, Any]:
        return dict(self.model.named_parameters())


def warm_up(shape: Shape) -> Shape:
    """Pairs that are too small to count."""
    return dataclasses.replace(shape, pairs=1, prompt=4, completion=8)


def make_step(side: str, shape: Shape, conditions: Conditions) -> Any:
    made = {"engine": EngineStep, "trl": TrlStep, "logits": LogitsStep}[side.removesuffix("_checkpointed")]
    return made(side, shape, conditions)


def measure(side: str, shape: Shape, conditions: Conditions) -> dict[str, Any]:
    """Time and peak memory of one forward and backward; in a fresh process."""
    prepare(conditions)
    step = make_step(side, shape, conditions)
    batch = step.batch(texts(shape, conditions.seed))
    step.run(step.batch(texts(warm_up(shape), conditions.seed)))
    for parameter in step.parameters().values():
        parameter.grad = None
    meter = cuda_meter if conditions.device.startswith("cuda") else cpu_meter
    with meter() as reading:
        reading["loss"] = step.run(batch)
    return reading


def check(sides: Sequence[str], shape: Shape, conditions: Conditions) -> dict[str, Any]:
    """Loss and gradients of every side against those of the first: one row per side."""
    prepare(conditions)
    rows: list[dict[str, Any]] = []
    expected: tuple[float, dict[str, Any]] | None = None
    for side in sides:
        step = make_step(side, shape, conditions)
        loss = step.run(step.batch(texts(shape, conditions.seed)))
        found = (loss, {name: parameter.grad for name, parameter in step.parameters().items()})
        expected = expected or found
        rows.append({"side": side, "loss": loss, **difference(found, expected)})
    return {"rows": rows}


# ------------------------------------------------------------------------------------------------------- the parent


def in_child(job: str, **arguments: Any) -> dict[str, Any]:
    """Runs `measure` or `check` in a process of its own; `{"failure": "out of memory"}` where it was killed for it."""
    encoded = json.dumps({"job": job, **arguments})
    with tempfile.TemporaryDirectory() as cache:
        surroundings = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", encoded]
        return answer_of(subprocess.run(command, capture_output=True, text=True, env=surroundings))


def child_main(encoded: str) -> None:
    job = json.loads(encoded)
    shape, conditions = Shape(**job["shape"]), Conditions(**job["conditions"])
    if job["job"] == "check":
        answer = check(job["sides"], shape, conditions)
    else:
        answer = measure(job["side"], shape, conditions)
    print(json.dumps(answer))


def results_table(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> str:
    """Of the repeats the least time, which whatever else the machine does can only add to, and the median memory."""
    lines = []
    for side in sides:
        own = [row for row in rows if row["side"] == side]
        if any(row["failure"] for row in own):
            lines.append([side, "-", own[0]["failure"]])
            continue
        seconds, peak = min(row["seconds"] for row in own), statistics.median(row["peak_bytes"] for row in own)
        lines.append([side, f"{seconds:.2f}", f"{peak / MEBIBYTE:.0f}"])
    return markdown_table(["side", "seconds", "peak MiB above the model"], lines)


def check_table(checked: dict[str, Any]) -> str:
    lines = [
        [row["side"], f"{row['loss']:.6f}", f"{row['loss_difference']:.1e}", f"{row['worst_gradient_difference']:.1e}"]
        for row in checked["rows"]
    ]
    return markdown_table(["side", "loss", "relative loss difference", "largest relative gradient difference"], lines)


def parser() -> Benchmark:
    p = Benchmark(__file__, __doc__, WithDefaults)
    p.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="what to measure")
    p.add_argument("--repeats", type=int, default=1, help="of each side; the table shows least time, median memory")
    p.add_argument("--pairs", type=int, default=4, help="pairs of the step")
    p.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    p.add_argument("--completion", type=int, default=512, help="tokens of a completion at most; half of it at least")
    p.add_argument("--hidden", type=int, default=512, help="hidden size")
    p.add_argument("--layers", type=int, default=4, help="decoder layers")
    p.add_argument("--heads", type=int, default=8, help="attention heads")
    p.add_argument("--intermediate", type=int, default=1376, help="MLP width")
    p.add_argument("--vocabulary", type=int, default=32000, help="vocabulary")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of torch")
    p.add_argument("--seed", type=int, default=0, help="of model and pairs")
    p.add_out("dpo_step.md")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    benchmark = parser()
    options = benchmark.begin(argv)
    if options.child is not None:
        child_main(options.child)
        return
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    conditions = Conditions(options.device, options.dtype, options.threads, options.seed)
    small = dataclasses.replace(shape, prompt=8, completion=16, vocabulary=min(shape.vocabulary, 512))
    exact = dataclasses.replace(conditions, dtype="float32")
    checked = in_child(
        "check", sides=options.sides, shape=dataclasses.asdict(small), conditions=dataclasses.asdict(exact)
    )
    print(check_table(checked), "\n", flush=True)
    for row in checked["rows"]:
        if not max(row["loss_difference"], row["worst_gradient_difference"]) <= LIMIT:
            raise SystemExit(f"error: the sides do not compute the same step, so nothing is compared: {row}")

    rows = []
    for repeat in range(options.repeats):
        for side in options.sides:
            reading = in_child(
                "measure", side=side, shape=dataclasses.asdict(shape), conditions=dataclasses.asdict(conditions)
            )
            nothing = {"seconds": None, "wall_seconds": None, "peak_bytes": None, "loss": None, "failure": ""}
            rows.append({"side": side, **dataclasses.asdict(shape), "repeat": repeat, **nothing, **reading})
            print(json.dumps(rows[-1]), flush=True)
    benchmark.facts["trl"] = version("trl")
    body = (
        f"One forward and backward of a DPO step: {shape.pairs} pairs, prompts of {shape.prompt} tokens, completions "
        f"of {shape.completion // 2} to {shape.completion}. Llama: hidden {shape.hidden}, {shape.layers} layers, "
        f"{shape.heads} heads, intermediate {shape.intermediate}, V {shape.vocabulary}, {conditions.dtype}, on "
        f"{conditions.device}. What the sides are, and why TRL's on a CPU say little of a GPU, is said at the top of "
        "`benchmarks/dpo_step.py`.\n\n"
        f"{results_table(rows, options.sides)}\n\n## Same pairs, same step\n\n{check_table(checked)}"
    )
    benchmark.write(options.out, "DPO step: engine against TRL", body, rows)


if __name__ == "__main__":
    main()
