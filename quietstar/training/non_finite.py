"""The batch of a step that gave NaN or infinity, kept for a closer look."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from quietstar.data.batches import Batch
from quietstar.training.output_dir import write_json

DIRECTORY = "non_finite"


def write_batch(run_directory: Path, step: int, batch: Batch, problem: str, seed: int) -> Path | None:
    """Writes `non_finite/step-00000007.json` and, with the tokens, `.safetensors`.

    Args:
        run_directory: Of the run.
        step: Optimizer step, counted from 1.
        batch: All texts of the step.
        problem: What was found.
        seed: Of the step's thoughts.

    Returns:
        The JSON file, or None where it cannot be written: what is being reported matters more.
    """
    file = run_directory / DIRECTORY / f"step-{step:08d}.json"
    tensors = {"tokens": batch.tokens.cpu().contiguous()}
    if batch.attention_mask is not None:
        tensors["attention_mask"] = batch.attention_mask.cpu().contiguous()
    try:
        file.parent.mkdir(exist_ok=True)
        save_file(tensors, file.with_suffix(".safetensors"))
        write_json(file, {"step": step, "problem": problem, "texts": list(batch.names), "thought_seed": seed})
    except (OSError, SafetensorError):
        return None
    return file
