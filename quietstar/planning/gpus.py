"""GPUs that a plan can be for, with what their makers say of them."""

from __future__ import annotations

from dataclasses import dataclass

from quietstar.errors import ConfigError

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: What `--gpu` calls it.
        memory: Bytes.
        bf16_tflops: Dense bfloat16 products with float32 sums, in 1e12 FLOP/s.
        float32_tflops: The same of float32, without tensor cores.
        bandwidth: Of its memory, in bytes/s.
        source: Where the numbers come from.
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
"""Memory is what nvidia-smi shows. Datasheets that give tensor cores with sparsity only are halved."""

RESERVED = 1.5 * 2**30
"""Bytes that CUDA's context, the libraries' workspaces and the allocator's gaps are assumed to take."""


def find_gpu(name: str) -> Gpu | None:
    """The GPU of that name, or None for "cpu"; upper and lower case, spaces and dashes are alike.

    Raises:
        ConfigError: There is none.
    """
    wanted = _plain(name)
    if wanted == "cpu":
        return None
    for gpu in GPUS.values():
        if _plain(gpu.name) == wanted:
            return gpu
    raise ConfigError(f"gpu: got {name!r}, needs one of {', '.join(GPUS)}, or cpu")


def gpu_here(device: str) -> Gpu | None:
    """The GPU that `training.device` means on this machine, if there is one."""
    import torch  # not at the top: a GPU that has a name is found without it

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


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
