"""Whole training steps of the engine, by kernel backend: tokens per second, utilisation, memory, and where time goes.

    python benchmarks/engine_throughput.py

A step is `learn(model, ...)` and `backward()` of one batch: sampling the thoughts, the differentiable pass, whose
forward is the sampling pass, all losses and all gradients; no optimizer. The model has Mistral-7B's shape and random
weights, and is built on the device. Every backend takes its steps on the same model in the same process.

Useful operations, from which utilisation follows, are those of one forward and one backward pass, recomputation left
out: 6 for each weight of the layers and each token of text and streams; 12 D for each visible (query, key) pair; 6 for
each weight of the output head and each row of a loss, 2 for each row that a token is sampled from; 6 for each weight of
the mixing head and each of its rows. They are given as a share of a large bf16 product measured in the same run, and of
the data sheet's rate.

First a model of two layers takes a step with given thoughts by every backend: losses and gradients must agree with the
reference backend's. The last table is one profiled step, device time by family of kernel.

The side `triton, liger` is the triton backend with the layers' elementwise work in Liger-Kernel's kernels
(`training.fused_layers liger`); it comes last, for the model then stays so.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from torch import Tensor

from benchmarks.environment import markdown_table
from benchmarks.gpu_timing import (
    LARGEST_ERROR,
    NOMINAL_BF16,
    KernelBenchmark,
    Measurement,
    Session,
    card,
    dtype_name,
    importable_from,
    relative_error,
)
from quietstar.model.backbone import fuse_layers
from quietstar.objective.learning import learn
from quietstar_kernels.backends import IMPLEMENTED

MODELS = {
    "mistral-7b": {
        **{"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 32000},
        **{"batch": 4, "length": 256, "thoughts": 2, "thought_length": 11, "lookahead": 4},
    },
    "tiny": {
        **{"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "vocabulary": 256},
        **{"batch": 2, "length": 48, "thoughts": 2, "thought_length": 4, "lookahead": 3},
    },
}
LIGER = "triton, liger"
CHECK_LAYERS, CHECK_LENGTH = 2, 32
LARGEST_GRADIENT_ERROR = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Of all gradients together, whose rounding errors add up through the layers."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch. K thoughts hang from every position but the last: P = (L - 1) K streams of S tokens."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    thoughts: int
    thought_length: int
    lookahead: int

    @property
    def stream_length(self) -> int:
        return self.thought_length + 2 + self.lookahead - 1

    @property
    def streams(self) -> int:
        return self.batch * (self.length - 1) * self.thoughts

    @property
    def text_tokens(self) -> int:
        return self.batch * self.length

    @property
    def tokens(self) -> int:
        """Through the layers, of text and streams."""
        return self.text_tokens + self.streams * self.stream_length

    @property
    def layer_weights(self) -> int:
        head_size = self.hidden // self.heads
        attention = 2 * self.hidden * head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all heads of all layers."""
        L, S = self.length, self.stream_length
        text = L * (L + 1) // 2
        streams = self.thoughts * (S * (L - 1) * L // 2 + (L - 1) * S * (S + 1) // 2)
        return self.layers * self.heads * self.batch * (text + streams)

    @property
    def loss_rows(self) -> int:
        """Of the text, of every lookahead token that lies in the text, and of every thought token."""
        L = self.length
        talk = self.thoughts * sum(L - 1 - j for j in range(self.lookahead))
        return self.batch * (L - 1 + talk) + self.streams * self.thought_length

    def flops(self) -> dict[str, int]:
        """Useful operations of a step by part."""
        head_size, head_weights = self.hidden // self.heads, self.vocabulary * self.hidden
        mixing_weights = 3 * self.hidden**2
        return {
            "layers": 6 * self.layer_weights * self.tokens,
            "attention": 12 * head_size * self.pairs,
            "output head": 6 * head_weights * self.loss_rows,
            "sampling": 2 * head_weights * self.streams * self.thought_length,
            "mixing head": 6 * mixing_weights * self.streams * self.lookahead,
        }


def build_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A thinking model with random weights, built where it is used."""
    from transformers import AutoModelForCausalLM, MistralConfig

    from quietstar.model.modeling import QuietStarForCausalLM

    config = MistralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length + shape.stream_length,
        sliding_window=None,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return QuietStarForCausalLM.from_base(
        base.to(device=device),
        start_text=[0],  # token ids: this base has no tokenizer
        end_text=[0],
        thought_length=shape.thought_length,
        lookahead=shape.lookahead,
        thoughts_per_position=shape.thoughts,
        initial_mixing_weight=0.1,
    )


def clear(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None


# ---------------------------------------------------------------------------------------------------------- the check


def check_backends(shape: Shape, dtype: torch.dtype, device: torch.device, backends: Sequence[str]) -> list[list[str]]:
    """One line per backend: relative error of all losses, of all gradients and of the worst one, against the reference.

    Raises:
        SystemExit: a backend computes another step.
    """
    small = dataclasses.replace(
        shape, layers=min(CHECK_LAYERS, shape.layers), length=min(CHECK_LENGTH, shape.length), batch=1
    )
    model = build_model(small, dtype, device)
    with torch.no_grad():  # starts at zero, where half of the gradients are zero too
        model.mixing_head.output.weight.normal_(std=0.05)
    input_ids = torch.randint(small.vocabulary, (1, small.length), device=device)
    tokens = torch.randint(small.vocabulary, (1, small.streams, small.thought_length), device=device)
    expected: tuple[Tensor, dict[str, Tensor]] | None = None
    lines = []
    for backend in ("reference", *(name for name in backends if name != "reference")):
        found = given_thoughts(model, backend, input_ids, tokens)
        expected = expected or found
        both = (found, expected)
        loss_error = relative_error(found[0], expected[0])
        errors = {name: relative_error(grad, expected[1][name]) for name, grad in found[1].items()}
        worst = max(errors, key=lambda name: errors[name])
        together = relative_error(*(torch.cat([grads[name].flatten() for name in errors]) for _, grads in both))
        lines.append([backend, f"{loss_error:.1e}", f"{together:.1e}", f"{errors[worst]:.1e}", worst])
        if not (loss_error <= LARGEST_ERROR[dtype] and together <= LARGEST_GRADIENT_ERROR[dtype]):  # NaN is not
            raise SystemExit(f"error: backends do not compute the same step, so nothing is timed: {lines[-1]}")
    return lines


def given_thoughts(model: Any, backend: str, input_ids: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """All losses of one step with given thoughts, in one vector, and the gradients of the loss by parameter.

    REINFORCE is left out: its weights are differences of nearly equal losses, which magnify every rounding.
    """
    from quietstar.config.objective import resolve_objective

    clear(model)
    model.config.backend = backend
    objective = dataclasses.replace(resolve_objective("default"), policy_weight=0.0)
    thoughts = model.think(input_ids, tokens=tokens, record=True)
    step = learn(model, input_ids, thoughts=thoughts, objective=objective)
    step.loss.backward()
    losses = torch.cat([step.base_nll.flatten(), step.talk_nll.flatten(), thoughts.logprob.flatten()]).float()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return losses, grads


# ---------------------------------------------------------------------------------------------------------- profiling

FAMILIES = (
    ("fused layers", r"^_(block_)?(rms_norm|swiglu|triton_rope)"),
    ("text attention", r"flash|fmha|scaled_dot|sdpa"),
    ("matrix products", r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|aten::(mm|addmm|bmm|matmul|linear)"),
    ("copies", r"memcpy|memset|copy|cat|fill|aten::(zero_|to)"),
    ("indexing", r"index|gather|scatter|embedding"),
    ("reductions", r"reduce|norm|softmax|cumsum|scan|sort|arg(max|min)|aten::(sum|mean|max|amax|rsqrt)"),
    ("elementwise", r"elementwise|vectorized|pointwise|distribution|aten::"),
    ("autograd", r"backward|^_|autograd"),
)
"""Family -> pattern of a kernel's name, the first that is found; the project's own kernels go before them all."""


def own_kernels() -> dict[str, str]:
    """Name of each Triton kernel of the project -> its package."""
    found = {}
    for package in ("thought_attention", "mixed_cross_entropy", "token_sampling"):
        module = importlib.import_module(f"quietstar_kernels.{package}.triton_kernels")
        found.update({name: package for name in vars(module) if name.endswith("_kernel")})
    return found


def family(name: str, own: dict[str, str]) -> str:
    if name in own:
        return own[name]
    for label, pattern in FAMILIES:
        if re.search(pattern, name, re.IGNORECASE):
            return label
    return "other"


def profile(call: Callable[[], object], on_gpu: bool, own: dict[str, str]) -> dict[str, float]:
    """Seconds of device time (CPU: of operators) by family in one call, the longest first."""
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as recorded:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue  # launches carry the time of their kernels once more
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds:
            seconds[family(event.key, own)] += microseconds / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


# ---------------------------------------------------------------------------------------------------------- measuring


def measure_side(session: Session, model: Any, shape: Shape, side: str, input_ids: Tensor) -> dict[str, float]:
    """A row with the time and memory of steps; returns the families of one more."""
    row = Measurement({"L": shape.length, "S": shape.stream_length}, "step", side, sum(shape.flops().values()), 0.0)
    backend = side.partition(",")[0]
    model.config.backend = backend

    def step() -> None:
        loss = learn(model, input_ids, seed=0).loss
        loss.backward()
        clear(model)

    def prepare() -> Callable[[], None]:
        if side == LIGER:
            importlib.import_module("liger_kernel.ops")  # or it is noted as not installed
            fuse_layers(model)
        step()  # compiles
        return step

    session.measure(row, prepare)
    clear(model)
    families: dict[str, float] = {}
    if row.timing is not None:
        on_gpu = session.meter.on_gpu
        families = profile(step, on_gpu, own_kernels() if backend == "triton" else {})
        session.release()
    return families


def steps_table(session: Session, shape: Shape, nominal: float | None, weights: int) -> str:
    columns = ["backend", "s", "text tokens/s", "all tokens/s", "TFLOP/s", "of measured", "of nominal"]
    columns += ["peak GiB", "time / first", "note"]
    first = session.rows[0].seconds
    lines = []
    for row in session.rows:
        if row.seconds is None:
            lines.append([row.side, row.failure, *["-"] * 7, row.note])
            continue
        rate = row.flops / row.seconds / 1e12
        lines.append(
            [
                row.side,
                f"{row.seconds:.4g}",
                f"{shape.text_tokens / row.seconds:.4g}",
                f"{shape.tokens / row.seconds:.5g}",
                f"{rate:.4g}",
                f"{100 * rate / session.ceilings.teraflops:.3g} %",
                "-" if nominal is None else f"{100 * rate / nominal:.3g} %",
                f"{(weights + (row.peak_bytes or 0)) / 2**30:.4g}",
                "-" if first is None else f"{row.seconds / first:.2f}",
                row.note,
            ]
        )
    return markdown_table(columns, lines)


def families_table(found: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for families in found.values() for name in families))
    lines = []
    for name in names:
        cells = []
        for families in found.values():
            total = sum(families.values())
            share = families.get(name, 0.0)
            cells += [f"{1000 * share:.4g}", f"{100 * share / total:.3g} %" if total else "-"]
        lines.append([name, *cells])
    return markdown_table(["family", *(text for backend in found for text in (f"{backend}, ms", "share"))], lines)


def csv_rows(
    session: Session, shape: Shape, nominal: float | None, weights: int, found: dict[str, dict[str, float]]
) -> list[dict[str, object]]:
    families = list(dict.fromkeys(name for by_family in found.values() for name in by_family))
    rows: list[dict[str, object]] = []
    for row in session.rows:
        rate = None if row.seconds is None else row.flops / row.seconds / 1e12
        rows.append(
            {
                "backend": row.side,
                **dataclasses.asdict(shape),
                "seconds": row.seconds,
                "seconds_20": None if row.timing is None else row.timing.low,
                "seconds_80": None if row.timing is None else row.timing.high,
                "repetitions": None if row.timing is None else row.timing.repetitions,
                "text_tokens": shape.text_tokens,
                "all_tokens": shape.tokens,
                "useful_flops": row.flops,
                "tflops": rate,
                "of_measured": None if rate is None else rate / session.ceilings.teraflops,
                "of_nominal": None if rate is None or nominal is None else rate / nominal,
                "weight_bytes": weights,
                "peak_bytes_above_weights": row.peak_bytes,
                **{f"{name} seconds": found.get(row.side, {}).get(name) for name in families},
                "failure": row.failure,
                "note": row.note,
            }
        )
    return rows


def parser() -> KernelBenchmark:
    p = KernelBenchmark(__file__, __doc__, (*IMPLEMENTED, LIGER), ("bfloat16", "float32"))
    what = p.add_argument_group("model and step")
    what.add_argument("--model", choices=list(MODELS), help="shape of model and batch (default: of the device)")
    for name in (field.name for field in dataclasses.fields(Shape)):
        what.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"in place of the model's {name}")
    what.add_argument("--comparators", type=Path, help="folder with packages that are not installed")
    what.add_argument("--no-check", action="store_true", help="skip the check that all backends take the same step")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    benchmark = parser()
    options = benchmark.begin(argv)
    on_gpu, dtype = options.on_gpu, options.dtype
    sizes = dict(MODELS[options.model or ("mistral-7b" if on_gpu else "tiny")])
    if options.quick:
        sizes |= {"length": 12, "layers": 1}
    sizes |= {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
    shape = Shape(**sizes)
    sides = sorted(options.sides or (["triton", "torch"] if on_gpu else ["torch", "reference"]), key=LIGER.__eq__)
    session = benchmark.start(options, IMPLEMENTED[:2], seconds_on_gpu=10.0, least=2)
    device = session.meter.device
    checked = (
        [] if options.no_check else check_backends(shape, dtype, device, [side for side in sides if side != LIGER])
    )
    session.release()

    model = build_model(shape, dtype, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    input_ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), device=device)
    families: dict[str, dict[str, float]] = {}
    nominal = next((rate for name, rate in NOMINAL_BF16.items() if name in card(device)), None)
    if nominal is not None:
        benchmark.facts["nominal bf16"] = f"{nominal:.4g} TFLOP/s, dense, data sheet"

    def body() -> str:
        flops = ", ".join(f"{name} {count / 1e12:.4g}" for name, count in shape.flops().items())
        parts = [
            f"Mistral: hidden {shape.hidden}, {shape.layers} layers, {shape.heads}:{shape.kv_heads} heads, "
            f"intermediate {shape.intermediate}, V {shape.vocabulary}, {dtype_name(dtype)}, random weights; B "
            f"{shape.batch}, L {shape.length}, K {shape.thoughts}, T {shape.thought_length}, lookahead "
            f"{shape.lookahead}, S {shape.stream_length}: {shape.text_tokens} text tokens and "
            f"{shape.tokens - shape.text_tokens} stream tokens in a step. Useful operations in 10^12: {flops}. What is "
            "counted is said at the top of `benchmarks/engine_throughput.py`.",
            steps_table(session, shape, nominal, weights),
        ]
        timed = {backend: found for backend, found in families.items() if found}
        if timed:
            time_of = "Device time" if on_gpu else "CPU time of operators"
            parts += [
                f"## One step by family of kernel\n\n{time_of}. The torch backend's attention, losses and sampling are "
                "matrix products and elementwise kernels like those of the layers.",
                families_table(timed),
            ]
        if checked:
            head = ["backend", "relative error of losses", "of all gradients", "of the worst", "which is"]
            parts += [
                "## Same thoughts, same step\n\nTwo layers, against the reference:",
                markdown_table(head, checked),
            ]
        return "\n\n".join(parts)

    def rows() -> list[dict[str, object]]:
        return csv_rows(session, shape, nominal, weights, families)

    with (
        importable_from(options.comparators),
        benchmark.results(session, options, "Training steps by kernel backend", body, rows),
    ):
        for side in sides:
            families[side] = measure_side(session, model, shape, side, input_ids)


if __name__ == "__main__":
    main()
