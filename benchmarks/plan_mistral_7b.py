"""What training Mistral-7B takes, at the paper's setting and at cheaper ones: `python -m quietstar.plan`, many times.

    python benchmarks/plan_mistral_7b.py

No weight is loaded and no network is used. The memory is that of the Triton kernels, the same on every GPU; how well
the plan knows it where it can be measured is in `plan_accuracy.md`. The seconds rest on the assumptions that are
printed with them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar.config.commands import parse_train_config
from quietstar.planning.gpus import GPUS
from quietstar.planning.model import base_configuration
from quietstar.planning.plan import ASSUMPTIONS, part_seconds, usable_memory
from quietstar.planning.trace import (
    GRADIENTS,
    KEYS_VALUES,
    LAYER_INPUTS,
    OPTIMIZER,
    RECOMPUTE,
    RECORDED,
    WEIGHTS,
    Trace,
    trace_model,
)

PRESET = ("--preset", "mistral-7b", "--data.path", ".")
SETTINGS = {
    "the paper's": "",
    "micro-batch 1": "--training.micro_batch_size 1",
    "8-bit moments": "--training.micro_batch_size 1 --training.optimizer adamw_8bit",
    "8-bit moments, replay down": (
        "--training.micro_batch_size 1 --training.optimizer adamw_8bit --training.replay down"
    ),
    "8-bit moments, replay all": (
        "--training.micro_batch_size 1 --training.optimizer adamw_8bit --training.replay all"
    ),
    "a quarter of the positions": "--training.micro_batch_size 1 --model.positions entropy:0.25",
    "LoRA": "--finetuning.lora_rank 16",
    "LoRA, micro-batch 1": "--finetuning.lora_rank 16 --training.micro_batch_size 1",
    "LoRA, micro-batch 4, replay mlp": (
        "--finetuning.lora_rank 16 --training.micro_batch_size 4 --training.replay mlp"
    ),
    "LoRA, a quarter of the positions": (
        "--finetuning.lora_rank 16 --training.micro_batch_size 1 --model.positions entropy:0.25"
    ),
    "two passes, micro-batch 1": "--training.micro_batch_size 1 --training.reuse_sampling_pass false",
    "language modelling": "--training.method language_modeling",
}
"""Arguments besides those of the preset."""
SHOWN = {
    "weights": (WEIGHTS,),
    "gradients": (GRADIENTS,),
    "optimizer": (OPTIMIZER,),
    "layer inputs": (LAYER_INPUTS,),
    "recorded": (RECORDED,),
    "thought K/V": (KEYS_VALUES,),
    "recompute": (RECOMPUTE,),
}
GIBIBYTE = 2**30


def trace_setting(arguments: str) -> Trace:
    """The trace of the preset with further arguments."""
    config = parse_train_config([*PRESET, *arguments.split()])
    return trace_model(config, base_configuration(config)[0], "cuda")


def row(name: str, trace: Trace) -> list[str]:
    """One setting: what it takes, the GPUs that have it, and how long a step would take on the largest of them."""
    seconds = sum(part_seconds(trace, GPUS["H200"]).values())
    largest = [f"{sum(trace.largest[kind] for kind in kinds) / GIBIBYTE:.1f}" for kinds in SHOWN.values()]
    total = trace.peak.total()
    fitting = [gpu.name for gpu in GPUS.values() if total <= usable_memory(gpu)]
    smallest = min(fitting, key=lambda name: GPUS[name].memory, default="none")
    flops = sum(trace.flops(part) for part in trace.work)
    return [
        name,
        *largest,
        f"{trace.activations / GIBIBYTE:.1f}",
        f"{total / GIBIBYTE:.1f}",
        smallest,
        f"{flops / 1e12:,.0f}",
        f"{seconds:.1f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_out("plan_mistral_7b.md")
    options = parser.begin(arguments)
    rows = []
    for name in options.settings:
        rows.append(row(name, trace_setting(SETTINGS[name])))
        print(rows[-1], flush=True)
    columns = [
        "setting",
        *SHOWN,
        "activations at the peak",
        "peak",
        "smallest GPU",
        "TFLOP a step",
        "s a step, H200",
    ]
    commands = "\n".join(
        f"- {name}: `{' '.join(['python -m quietstar.plan --preset mistral-7b', *extra.split()])}`"
        for name, extra in SETTINGS.items()
    )
    body = (
        "Mistral-7B in bfloat16 with float32 masters; a step is 8 texts of 256 tokens, 2 thoughts of 9 tokens at every "
        "position, lookahead 4. GiB: the most of each kind in a step, which come at different times, and the peak of "
        "all. The smallest GPU that has it is one of "
        f"{', '.join(GPUS)}; seconds are expected, not measured, assuming {ASSUMPTIONS}.\n\n"
        f"{markdown_table(columns, rows)}\n\n{commands}"
    )
    parser.write(options.out, "Plans for Mistral-7B", body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
