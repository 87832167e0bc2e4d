"""What a step takes, by kind and by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig

from quietstar.config.training import Replay, TrainConfig
from quietstar.planning import kernels
from quietstar.planning.meta_tensors import Ledger, MetaTensors
from quietstar.planning.trace import (
    ACTIVATIONS,
    BACKWARD,
    GRADIENTS,
    KEYS_VALUES,
    KINDS,
    LAYER_INPUTS,
    OPTIMIZER,
    PARTS,
    RECOMPUTE,
    RECOMPUTING,
    RECORDED,
    TALK,
    THINK,
    WEIGHTS,
    Trace,
    trace_model,
    trace_step,
)
from quietstar_kernels import mixed_cross_entropy

Small = Callable[..., MistralConfig]
Run = Callable[..., TrainConfig]

L, P, S, E, LAYERS = 8, 7 * 2, 2 + 2 + 2 - 1, 32, 2
"""Of the runs below: text, streams, stream length, width, layers."""


@pytest.fixture(scope="module")
def default(small: Small, run: Run) -> Trace:
    return trace_step(run(), small(), "cpu")


def test_kinds_and_parts_are_all_named(default: Trace) -> None:
    assert {kind for kind, size in default.largest.items() if size} <= KINDS.keys()
    assert default.work.keys() <= set(PARTS)


def test_the_recording_and_the_cache_have_their_shapes(default: Trace) -> None:
    # the text's outputs of one layer more: the recording is moved to where it has room for the streams
    assert LAYERS * (L + P * S) * E * 4 <= default.largest[LAYER_INPUTS] <= LAYERS * (2 * L + P * S) * E * 4
    keys_and_values = 2 * 2 * (E // 4)  # two heads of a quarter of the width
    assert default.largest[KEYS_VALUES] == LAYERS * (L + P * S) * keys_and_values * 4


def test_every_trained_weight_gets_a_gradient_and_two_moments(default: Trace) -> None:
    trained = default.largest[GRADIENTS]
    assert default.standing[OPTIMIZER] == pytest.approx(2 * trained, rel=0.01)  # and a step count each
    assert default.standing[WEIGHTS] == pytest.approx(trained, rel=0.01)  # and rotary frequencies


def test_reusing_the_sampling_pass_trades_activations_for_a_recompute(small: Small, run: Run, default: Trace) -> None:
    two_passes = trace_step(run(training__reuse_sampling_pass=False), small(), "cpu")
    assert default.largest[RECOMPUTE] > 0 == default.largest[ACTIVATIONS]
    assert two_passes.largest[ACTIVATIONS] > two_passes.largest[RECOMPUTE] == 0
    assert default.flops(RECOMPUTING) == two_passes.flops(TALK) > 0
    assert default.flops(TALK) == two_passes.flops(RECOMPUTING) == 0
    assert two_passes.kept.total() > default.kept.total()


def test_text_and_stream_tokens_are_those_of_the_whole_step(small: Small, run: Run, default: Trace) -> None:
    step = trace_step(run(training__batch_size=6, training__micro_batch_size=2), small(), "cuda")
    assert (default.text_tokens, default.stream_tokens) == (L, P * S)
    assert (step.text_tokens, step.stream_tokens, step.micro_batches) == (6 * L, 6 * P * S, 3)
    assert step.flops(THINK) == pytest.approx(6 * default.flops(THINK), rel=0.05)  # a CPU multiplies hidden keys too


def test_replay_trades_recorded_results_for_recomputed_products(small: Small, run: Run, default: Trace) -> None:
    """By the sizes of the weights: a product counts two FLOPs a token and weight, its result a float32 a token."""
    tokens, key_width, wide = L + P * S, E // 2, 48
    down, mlp, attention = (wide, E), 2 * (E, wide), (E, E) + 2 * (E, key_width) + (E, E)
    stages: dict[Replay, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "down": (down, ()),
        "mlp": (down + mlp, mlp),
        "linears": (down + mlp + attention, mlp + attention),
    }
    for stage, (spared, recorded) in stages.items():
        found = trace_step(run(training__replay=stage), small(), "cpu")
        weights = sum(spared[k] * spared[k + 1] for k in range(0, len(spared), 2))
        assert default.flops(RECOMPUTING) - found.flops(RECOMPUTING) == 2 * tokens * LAYERS * weights
        results = LAYERS * tokens * 4 * sum(recorded[1::2])
        # the text's once more: the record is moved to where it has room for the streams
        assert results <= found.largest[RECORDED] <= results * (1 + L / tokens)
        assert found.flops(THINK) == default.flops(THINK)
        assert found.flops(BACKWARD) == default.flops(BACKWARD)
    whole = trace_step(run(training__replay="all"), small(), "cuda")
    assert whole.flops(RECOMPUTING) == 0
    # outputs, and a log-sum-exp of each of four heads
    assert whole.largest[RECORDED] >= results + LAYERS * (L + P * S) * (E + 4) * 4


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_replay_down_takes_no_more_memory(small: Small, run: Run, backend: str) -> None:
    layers, down = (trace_step(run(training__replay=stage), small(), backend) for stage in ("layers", "down"))
    assert down.peak.total() <= layers.peak.total()
    assert down.largest[RECORDED] == 0
    assert down.kept == layers.kept


@pytest.mark.slow
@pytest.mark.parametrize("replay", ["layers", "all"])
def test_a_deep_model_follows_exactly_from_two_shallow_ones(small: Small, run: Run, replay: str) -> None:
    config = run(model__dtype="bfloat16", model__thought_length=1, finetuning__lora_rank=2, training__replay=replay)
    deep = small(num_hidden_layers=4)
    assert_same(trace_model(config, deep, "cuda"), trace_step(config, deep, "cuda"))


def assert_same(found: Trace, expected: Trace) -> None:
    def some(counts: Counter[str]) -> dict[str, int]:
        return {kind: size for kind, size in counts.items() if size}

    for name in ("standing", "kept", "peak", "largest"):
        assert some(getattr(found, name)) == some(getattr(expected, name)), name
    assert found.peak_time == expected.peak_time
    assert found.work.keys() == expected.work.keys()
    for part in expected.work:
        assert found.flops(part) == expected.flops(part)
        for value in ("flops", "bytes"):
            assert sum(getattr(w, value) * n for w, n in found.work[part].items()) == pytest.approx(
                sum(getattr(w, value) * n for w, n in expected.work[part].items())
            )


def test_what_is_kept_is_the_same_on_a_gpu(small: Small, run: Run, default: Trace) -> None:
    """In float32 the Triton kernels keep what the PyTorch ones do; between products they take less."""
    gpu = trace_step(run(), small(), "cuda")
    assert gpu.kept.total() == pytest.approx(default.kept.total(), rel=1e-3)
    assert gpu.standing == default.standing
    assert gpu.largest[kernels.LOGITS] < default.largest[kernels.LOGITS]
    assert gpu.flops(kernels.LOSS_HEAD) == pytest.approx(default.flops(kernels.LOSS_HEAD), rel=0.2)


def test_moments_of_eight_bits_take_a_quarter(small: Small, run: Run) -> None:
    config = run(training__method="language_modeling")
    eight, full = (
        trace_step(replace(config, training=replace(config.training, optimizer=name)), small(vocab_size=4096), "cpu")
        for name in ("adamw_8bit", "adamw")
    )
    assert 0.25 < eight.standing[OPTIMIZER] / full.standing[OPTIMIZER] < 0.35  # small tensors keep float32 moments


@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunks"),
    [(8192, 32000, 1), (8192, 32002, 1), (8192, 128256, 4), (8192, 151936, 5), (8192, 2**18, 8), (100, 2**18, 1)],
)
def test_the_plan_of_a_head_has_its_chunks(rows: int, vocabulary: int, chunks: int) -> None:
    """Rows of logits in float32 and of their gradient in 16 bits; of states rounded, scaled, and before rounding."""
    width, size = 64, -(-rows // chunks // 128) * 128 if chunks > 1 else rows
    ledger = Ledger()
    with MetaTensors(ledger, kernels.cuda_kernels(ledger)):
        base, thought = (torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        head = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
        weight, target = torch.empty(rows, requires_grad=True), torch.zeros(rows, dtype=torch.int64)
        ledger.restart()
        mixed_cross_entropy(base, thought, weight, head, target, row_weight=torch.empty(rows))
    work = ledger.work[kernels.LOSS_HEAD]
    products = {one: times for one, times in work.items() if one.flops}
    assert sum(products.values()) == 3 * chunks
    assert sum(one.flops * times for one, times in products.items()) == 3 * 2 * rows * vocabulary * width
    assert max(one.flops for one in products) == 2 * size * vocabulary * width
    chunk = size * (-(-vocabulary // 64) * 64) * (4 + 2) + size * width * (2 + 2 + 4)
    gradients = vocabulary * width * 4 + rows * width * 2
    assert ledger.largest[kernels.LOGITS] == pytest.approx(chunk + gradients, rel=0.05)
