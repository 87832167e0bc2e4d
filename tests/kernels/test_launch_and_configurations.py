"""The pinned table of configurations, and a kernel call as a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quietstar_kernels import configurations
from quietstar_kernels.configurations import architecture, configuration, table, use_configuration
from quietstar_kernels.dispatch import interpreting
from quietstar_kernels.launch import Launch
from quietstar_kernels.thought_attention.op import LARGEST_D, case_of, tile_spans
from tests.kernels.attention_cases import KERNELS

ARCHITECTURES = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "interpreter"]
CASES = [f"{bits}-bit D{D}" for bits in (16, 32, 64) for D in (32, 64, 128, 256)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("row", ARCHITECTURES)
def test_table_covers_every_head_size(row: str) -> None:
    """A call that the checks let through finds its configuration: also the backward pass, after a long forward one."""
    # keys and values of the smallest tile take 128 KiB there, more than the chip has
    too_large = {"64-bit D256"} if row == "sm_86" else set()
    for kernel, blocks in KERNELS.items():
        found = table()[row][kernel]
        assert set(found) == set(CASES) - too_large, kernel
        for case, chosen in found.items():
            assert set(chosen) - {"maxnreg"} == {*blocks, "num_warps", "num_stages"}, (kernel, case)
            if "maxnreg" in chosen:
                assert 32 <= chosen["maxnreg"] <= 255 and chosen["maxnreg"] % 8 == 0, (kernel, case)
            for block in blocks:
                size = chosen[block]
                assert size >= 16 and size & (size - 1) == 0, f"{kernel} {case}: tl.dot wants a power of two from 16"
            assert chosen["num_warps"] in (1, 2, 4, 8, 16) and 1 <= chosen["num_stages"] <= 8


def test_table_has_no_row_that_nothing_reads() -> None:
    assert sorted(table()) == sorted(ARCHITECTURES)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32)])
def test_every_head_size_has_a_case(dtype: torch.dtype, bits: int) -> None:
    for D in range(1, LARGEST_D + 1):
        case = case_of(torch.empty(1, 1, 1, 1, D, dtype=dtype, device="meta"))
        assert case in CASES and case.startswith(f"{bits}-bit")
        padded = int(case.split("D")[1])
        assert padded >= D and (padded == 32 or padded < 2 * D)


def test_architectures_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    wanted = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_86"}
    for capability, row in wanted.items():
        architecture.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        assert architecture(CPU) == row
    architecture.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert architecture(CPU) == "gfx942"
    architecture.cache_clear()


@pytest.mark.skipif(not interpreting(), reason="looks at the interpreter's row")
def test_without_a_configuration_the_kernel_and_the_case_are_named() -> None:
    with pytest.raises(ValueError, match=r"attention.forward: no configuration for 16-bit D512 on interpreter; use"):
        configuration("attention.forward", "16-bit D512", CPU)


@pytest.mark.skipif(not interpreting(), reason="looks at the interpreter's row")
def test_another_configuration_holds_within_its_block_only() -> None:
    kernel, case = "thought_attention.forward", "16-bit D64"
    pinned = configuration(kernel, case, CPU)
    with use_configuration(kernel, {"BLOCK_M": 1}):
        with use_configuration(kernel, {"BLOCK_M": 2}), use_configuration("another", {"BLOCK_M": 3}):
            assert configuration(kernel, case, CPU) == {"BLOCK_M": 2}
            assert configuration("another", "any", CPU) == {"BLOCK_M": 3}
        assert configuration(kernel, case, CPU) == {"BLOCK_M": 1}
        with pytest.raises(KeyError), use_configuration("another", {}):
            raise KeyError
        with pytest.raises(ValueError, match="another: no configuration"):
            configuration("another", "any", CPU)
    assert configuration(kernel, case, CPU) == pinned


class Recorded:
    """Stands for a kernel."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.calls.append((grid, arguments))


def test_launch_runs_its_kernel_with_everything_by_name() -> None:
    kernel, out = Recorded(), torch.zeros(3)
    chosen = {"BLOCK": 16, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
    Launch(kernel, (2, 3), {"out": out, "rows": 5}, chosen, {"D": 80}).run()
    assert kernel.calls == [((2, 3), {"out": out, "rows": 5, "D": 80, **chosen, "enable_fp_fusion": True})]


@pytest.mark.parametrize("grid", [(0,), (4, 0), (0, 4)])
def test_an_empty_grid_launches_nothing(grid: tuple[int, ...]) -> None:
    """CUDA refuses it, and there is nothing to compute."""
    kernel = Recorded()
    Launch(kernel, grid, {}, {}).run()
    assert not kernel.calls


def test_strides_whose_tiles_do_not_fit_32_bits() -> None:
    """Offsets within a tile have 32 bits; heads that lie 4 GiB apart would wrap around and read another tensor."""
    k_text, k_thought = torch.empty(1, 3, 1, 8, device="meta"), torch.empty(1, 2, 1, 1, 8, device="meta")
    plain = torch.empty(1, 2, 1, 2, 8, device="meta")
    scattered = torch.empty(2**31 + 64, device="meta").as_strided((1, 2, 1, 2, 8), (0, 8, 8, 2**31, 1))
    assert max(tile_spans(plain, k_text, k_text, k_thought, k_thought).values()) < 2**31
    spans = tile_spans(scattered, k_text, k_text, k_thought, k_thought)
    assert [name for name, span in spans.items() if span >= 2**31] == ["q"]
