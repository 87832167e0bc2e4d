"""The GPUs that a plan can be made for, with the numbers that their makers state."""

from __future__ import annotations

from dataclasses import dataclass

from quietstar.errors import ConfigError

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU and its speed.

    Args:
        name: Name of the GPU for the option `--gpu`.
        memory: Size of the GPU's memory in bytes.
        bf16_tflops: Peak of dense bfloat16 products with float32 sums, in 1e12 FLOP/s.
        float32_tflops: Peak of float32 products without tensor cores, in 1e12 FLOP/s.
        bandwidth: Memory bandwidth in bytes/s.
        source: Datasheet or paper with these numbers.
    """

    name: str
    memory: int
    bf16_tflops: float
    float32_tflops: float
    bandwidth: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 143771 * MEBIBYTE, 989, 67, 4.8e12, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
        Gpu("H100", 81559 * MEBIBYTE, 989, 67, 3.35e12, "NVIDIA H100 Tensor Core GPU datasheet (SXM)"),
        Gpu("H100-PCIe", 81559 * MEBIBYTE, 756, 51, 2.0e12, "NVIDIA H100 Tensor Core GPU datasheet (PCIe)"),
        Gpu("A100-80GB", 81920 * MEBIBYTE, 312, 19.5, 2.039e12, "NVIDIA A100 Tensor Core GPU datasheet (SXM)"),
        Gpu("A100-40GB", 40960 * MEBIBYTE, 312, 19.5, 1.555e12, "NVIDIA A100 Tensor Core GPU datasheet (SXM)"),
        Gpu("L40S", 46068 * MEBIBYTE, 362, 91.6, 0.864e12, "NVIDIA L40S datasheet"),
        Gpu("A6000", 49140 * MEBIBYTE, 154.8, 38.7, 0.768e12, "NVIDIA Ampere GA102 whitepaper (RTX A6000)"),
        Gpu("RTX-4090", 24564 * MEBIBYTE, 165.2, 82.6, 1.008e12, "NVIDIA Ada whitepaper (GeForce RTX 4090)"),
        Gpu("RTX-3090", 24576 * MEBIBYTE, 71, 35.6, 0.936e12, "NVIDIA Ampere GA102 whitepaper (GeForce RTX 3090)"),
        Gpu("L4", 23034 * MEBIBYTE, 121, 30.3, 0.3e12, "NVIDIA L4 datasheet"),
    )
}
"""Known GPUs by name. Memory is what nvidia-smi shows. Numbers of datasheets that state only the speed of tensor cores
with sparsity are halved."""

RESERVED = 1.5 * 2**30
"""Bytes that the CUDA context, the workspaces of libraries and the allocator's gaps are assumed to take."""


def find_gpu(name: str) -> Gpu | None:
    """Returns the GPU of a name, or None for "cpu"; upper and lower case, spaces and dashes make no difference.

    Raises:
        ConfigError: There is no such GPU.
    """
    wanted = _plain(name)
    if wanted == "cpu":
        return None
    for gpu in GPUS.values():
        if _plain(gpu.name) == wanted:
            return gpu
    raise ConfigError(f"gpu: got {name!r}, needs one of {', '.join(GPUS)}, or cpu")


def gpu_here(device: str) -> Gpu | None:
    """Returns the GPU that `training.device` means on this machine; None for a CPU or an unknown GPU."""
    import torch  # not at the top: `find_gpu` does not need it

    if device == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.device(device if device != "auto" else "cuda"))
    known = next((gpu for gpu in GPUS.values() if _plain(gpu.name) in _plain(properties.name)), None)
    if known is None:
        return None
    return Gpu(
        properties.name,
        properties.total_memory,
        known.bf16_tflops,
        known.float32_tflops,
        known.bandwidth,
        known.source,
    )


def known_gpu_here(device: str, purpose: str) -> Gpu | None:
    """Returns the GPU that `training.device` means on this machine; None for a CPU.

    Args:
        device: Value of `training.device`.
        purpose: Option that needs to know it, for the message.

    Raises:
        ConfigError: The GPU is unknown.
    """
    import torch

    gpu = gpu_here(device)
    if gpu is None and device != "cpu" and torch.cuda.is_available():
        raise ConfigError(f"{purpose}: needs to know this GPU's memory; known are {', '.join(GPUS)}")
    return gpu


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
