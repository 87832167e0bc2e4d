"""The engine's benchmark counts what the engine computes, and runs."""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import engine_throughput
from benchmarks.engine_throughput import LIGER, MODELS, Shape, build_model, check_backends, family, main, own_kernels
from quietstar.objective.learning import learn

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dataclasses.replace(Shape(**MODELS["tiny"]), length=7, layers=1)


def test_counts_are_those_of_the_model_and_of_a_step() -> None:
    torch.manual_seed(0)
    model = build_model(SHAPE, torch.float32, torch.device("cpu"))
    matrices = [p for name, p in model.base.named_parameters() if ".layers." in name and p.dim() == 2]
    assert SHAPE.layer_weights == sum(p.numel() for p in matrices)
    mixing = sum(p.numel() for p in model.mixing_head.parameters() if p.dim() == 2 and p.shape[0] > 1)
    assert SHAPE.flops()["mixing head"] == 6 * mixing * SHAPE.streams * SHAPE.lookahead

    step = learn(model, torch.randint(SHAPE.vocabulary, (SHAPE.batch, SHAPE.length)))
    assert step.thoughts.tokens.numel() == SHAPE.streams * SHAPE.thought_length
    assert SHAPE.loss_rows == step.base_nll.numel() + int(step.target_mask.sum()) + step.thoughts.tokens.numel()
    anchor, S = step.thoughts.anchor.long(), SHAPE.stream_length
    pairs = SHAPE.batch * sum(range(1, SHAPE.length + 1)) + int(((anchor + 1) * S + S * (S + 1) // 2).sum())
    assert SHAPE.pairs == SHAPE.layers * SHAPE.heads * pairs


def test_a_backend_that_takes_another_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = engine_throughput.given_thoughts

    def wrong(model: object, backend: str, *arguments: torch.Tensor) -> object:
        losses, grads = given(model, backend, *arguments)
        if backend == "torch":
            grads["base.lm_head.weight"] = grads["base.lm_head.weight"] * 1.1
        return losses, grads

    monkeypatch.setattr(engine_throughput, "given_thoughts", wrong)
    with pytest.raises(SystemExit, match=r"same step.*base\.lm_head\.weight"):
        check_backends(SHAPE, torch.float32, torch.device("cpu"), ["torch"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>(Flash_fwd_params)", "text attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "text attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float>>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reductions"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("forward_kernel", "thought_attention"),
        ("sample_kernel", "token_sampling"),
        ("_rms_norm_forward_kernel", "fused layers"),
        ("_block_rms_norm_backward_kernel", "fused layers"),
        ("_swiglu_backward_kernel", "fused layers"),
        ("_triton_rope", "fused layers"),
        ("something new", "other"),
    ],
)
def test_families_of_kernels(name: str, expected: str) -> None:
    pytest.importorskip("triton")
    assert family(name, own_kernels()) == expected


def test_a_step_by_every_backend_that_a_cpu_can_run(tmp_path: Path) -> None:
    main(["--quick", "--device", "cpu", "--output-dir", str(tmp_path)])
    text = (tmp_path / "engine_throughput_cpu.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert [row["backend"] for row in rows] == ["torch", "reference"]
    for row in rows:
        assert not row["failure"] and float(row["seconds"]) > 0
        families = [float(value) for name, value in row.items() if name.endswith(" seconds") and value]
        assert math.isfinite(sum(families)) and sum(families) > 0
    assert "## One step by family of kernel" in (tmp_path / "engine_throughput_cpu.md").read_text()


def test_a_side_whose_package_is_missing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    main(["--quick", "--device", "cpu", "--no-check", "--sides", LIGER, "torch", "--output-dir", str(tmp_path)])
    text = (tmp_path / "engine_throughput_cpu.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert [(row["backend"], row["failure"]) for row in rows] == [("torch", ""), (LIGER, "not installed")]
