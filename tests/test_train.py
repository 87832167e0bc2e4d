"""`python -m quietstar.train` on a model and text of the user's own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, GPTJForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.demos.textbook import character_model, character_tokenizer
from quietstar.model.adapters import has_adapters, merge_adapters
from quietstar.runs.checkpoints import latest_checkpoint
from quietstar.train import main
from quietstar.training.metrics import read_metrics
from tests.marks import slow
from tests.model.tiny import make_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    character_model(0).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    file = tmp_path / "text.txt"
    file.write_text("".join(rng.choice("0123456+=,\n") for _ in range(3000)))
    return file


def arguments(base: Path, text: Path, out: Path, *more: str) -> list[str]:
    fixed = (
        "--model.thought_length 3 --model.lookahead 2 --model.start_text [ --model.end_text ] --data.length 16 "
        "--data.append_eos false --training.steps 3 --training.batch_size 4 --training.learning_rate 1e-3 "
        "--training.eval_every 1 --training.log_every 1 --training.threads 1"
    )
    return ["--model.path", str(base), "--data.path", str(text), "--output_dir", str(out), *fixed.split(), *more]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--training.method", "language_modeling"),
        ("--model.thinking", "pause"),
        ("--model.positions", "entropy:0.5", "--training.micro_batch_size", "2"),
        ("--training.replay", "auto", "--training.micro_batch_size", "2"),
        slow(("--training.replay", "mlp", "--finetuning.lora_rank", "2")),
        slow(("--model.dtype", "bfloat16", "--training.reuse_sampling_pass", "false")),
        slow(
            ("--objective.preset", "authors", "--model.initial_mixing_weight", "null", "--model.embedding_scale", "100")
        ),
    ],
)
def test_a_run_trains_evaluates_and_saves_a_loadable_model(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(base, text, out, *more)) == 0
    assert "trained 3 steps" in capsys.readouterr().out
    metrics = read_metrics(out / "metrics.jsonl")
    assert [point["step"] for point in metrics if point["split"] == "train"] == [1, 2, 3]
    assert [point["step"] for point in metrics if point["split"] == "eval"] == [0, 1, 2, 3]
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model, QuietStarForCausalLM)
    if has_adapters(model):
        merge_adapters(model)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = [name for name, weight in model.base.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed
    assert AutoTokenizer.from_pretrained(checkpoint)("1+1")["input_ids"] == [1, 7, 1]
    assert (out / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--training.replay some", "training.replay: got 'some', needs one of layers, down, mlp, linears, all, auto"),
        ("--training.replay", "training.replay: got no value"),
        ("--training.replay all --training.reuse_sampling_pass false", "training.replay: got all, but without"),
        ("--training.replay down --training.reuse_sampling_pass false", "training.replay: got down, but without"),
        ("--training.replay down", "training.replay: got down, but gemma2 has no linear module whose value"),
    ],
)
def test_stages_of_replay_that_cannot_be(
    more: str, message: str, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"vocab_size": character_model(0).config.vocab_size}
    make_base("gemma2", **changes).save_pretrained(base)
    assert main(arguments(base, text, tmp_path / "run", *more.split())) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_every_stage_of_replay_trains_the_same_and_a_run_may_change_it(base: Path, text: Path, tmp_path: Path) -> None:
    losses = {}
    for stage in ("layers", "down", "auto"):
        out = tmp_path / stage
        assert main(arguments(base, text, out, "--training.replay", stage)) == 0
        losses[stage] = [point["loss"] for point in read_metrics(out / "metrics.jsonl", split="train")]
    assert losses["down"] == losses["layers"]
    assert losses["auto"] == pytest.approx(losses["layers"], rel=1e-4)
    assert "  replay: all\n" in (tmp_path / "auto" / "config.yaml").read_text()  # this machine has room for it
    more = ("--training.replay", "mlp", "--training.steps", "4", "--training.schedule", "constant")
    first = arguments(base, text, tmp_path / "run", *more, "--training.steps", "2", "--training.replay", "all")
    assert main(first) == 0
    assert main(arguments(base, text, tmp_path / "run", *more)) == 0


def test_the_saved_configuration_repeats_the_run(base: Path, text: Path, tmp_path: Path) -> None:
    assert main(arguments(base, text, tmp_path / "one")) == 0
    assert main(["--config", str(tmp_path / "one" / "config.yaml"), "--output_dir", str(tmp_path / "two")]) == 0
    values = [
        [point["loss"] for point in read_metrics(tmp_path / run / "metrics.jsonl", split="train")]
        for run in ("one", "two")
    ]
    assert values[0] == values[1]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(base: Path, text: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = ("--training.schedule", "constant")
    assert main(arguments(base, text, whole, *schedule, "--training.steps", "4")) == 0
    assert main(arguments(base, text, parts, *schedule, "--training.steps", "2")) == 0
    assert main(arguments(base, text, parts, *schedule, "--training.steps", "4")) == 0
    states = [
        QuietStarForCausalLM.from_pretrained(latest_checkpoint(run / "checkpoints")).state_dict()
        for run in (whole, parts)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_thinking_model_is_trained_further_with_what_it_learned(base: Path, text: Path, tmp_path: Path) -> None:
    """Wrapping a saved thinking model again would have thrown away START, END and the mixing head."""
    assert main(arguments(base, text, tmp_path / "one")) == 0
    first = latest_checkpoint(tmp_path / "one" / "checkpoints")
    assert first is not None
    more = ("--model.thought_length", "5", "--training.learning_rate", "1e-12")
    assert main(arguments(first, text, tmp_path / "two", *more)) == 0
    second = latest_checkpoint(tmp_path / "two" / "checkpoints")
    assert second is not None
    old, new = QuietStarForCausalLM.from_pretrained(first), QuietStarForCausalLM.from_pretrained(second)
    assert new.config.thought_length == 5
    torch.testing.assert_close(new.thought_embedding.weight, old.thought_embedding.weight)
    torch.testing.assert_close(new.mixing_head.layers[0].weight, old.mixing_head.layers[0].weight)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.thought_length", "4", "model.thought_length was 3 and is 4"),
        ("model.interpolation", "log_probs", "model.interpolation was 'logits' and is 'log_probs'"),
        ("objective.policy_weight", "0", "objective.policy_weight was None and is 0.0"),
        ("training.learning_rate", "1", "training.learning_rate was 0.001 and is 1.0"),
    ],
)
def test_a_finished_run_is_not_that_of_other_options(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str, message: str
) -> None:
    run = tmp_path / "run"
    assert main(arguments(base, text, run)) == 0
    saved = (run / "config.yaml").read_text()
    error = error_of(arguments(base, text, run, f"--{key}", value), capsys)
    assert f"belongs to another run: {message}. Set it back, or choose another output_dir" in error
    assert (run / "config.yaml").read_text() == saved
    assert main(arguments(base, text, run, "--model.backend", "reference")) == 0


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong input gives, with exit status 2 and no traceback."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(line) == 1, error
    return line[0]


class TestBadInput:
    """Each is one line that names the culprit, and exit status 2."""

    @pytest.mark.parametrize("content", ["", " \n\t\n "])
    def test_empty_or_blank_data(
        self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
    ) -> None:
        text.write_text(content)
        assert str(text) in error_of(arguments(base, text, tmp_path / "run"), capsys)

    @pytest.mark.parametrize("below", ["", "run"])
    def test_output_dir_that_cannot_be_written(
        self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        out = tmp_path / "file" / below
        for words in (arguments(base, text, out), ["--output_dir", str(out)]):
            assert f"output_dir: cannot write to {out}" in error_of(words, capsys)

    def test_text_shorter_than_one_block(
        self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text.write_text("1+1=2")
        error = error_of(arguments(base, text, tmp_path / "run"), capsys)
        assert str(text) in error and "5 tokens" in error and "16" in error

    def test_block_shorter_than_thought_and_lookahead(
        self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "data.length: got 4" in error_of(arguments(base, text, tmp_path / "run", "--data.length", "4"), capsys)

    def test_invalid_utf8(self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text.write_bytes(b"1+1=2\n2+2=\xff4\n" * 9)
        assert f"{text}:2" in error_of(arguments(base, text, tmp_path / "run"), capsys)

    def test_text_that_the_tokenizer_cannot_encode(
        self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text.write_text("letters\n" * 9)
        assert f"{text}: the tokenizer can't encode" in error_of(arguments(base, text, tmp_path / "run"), capsys)

    def test_start_text_that_the_tokenizer_cannot_encode(
        self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = arguments(base, text, tmp_path / "run", "--model.start_text", "---")
        assert "start_text: the tokenizer can't encode '---'" in error_of(words, capsys)

    def test_malformed_json_line(self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "text.jsonl"
        file.write_text('{"text": "1+1=2"}\n{"text": \n')
        assert f"{file}:2" in error_of(arguments(base, file, tmp_path / "run"), capsys)

    def test_directory_without_a_model(self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty").mkdir()
        assert str(tmp_path / "empty") in error_of(arguments(tmp_path / "empty", text, tmp_path / "run"), capsys)

    def test_model_whose_tokenizer_is_missing(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        character_model(0).save_pretrained(tmp_path / "bare")
        error = error_of(arguments(tmp_path / "bare", text, tmp_path / "run"), capsys)
        assert str(tmp_path / "bare") in error and "tokenizer" in error

    def test_tokenizer_without_a_model(self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        character_tokenizer().save_pretrained(tmp_path / "bare")
        error = error_of(arguments(tmp_path / "bare", text, tmp_path / "run"), capsys)
        assert str(tmp_path / "bare") in error and "config.json" in error

    def test_vocabulary_mismatch(
        self, base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = character_model(0)
        model.resize_token_embeddings(12)
        model.save_pretrained(base)
        error = error_of(arguments(base, text, tmp_path / "run"), capsys)
        assert "12" in error and "vocabulary" in error

    def test_unsupported_backbone(self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = GPTJConfig(vocab_size=13, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64)
        GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
        character_tokenizer().save_pretrained(tmp_path / "gptj")
        assert "gptj" in error_of(arguments(tmp_path / "gptj", text, tmp_path / "run"), capsys)

    @pytest.mark.parametrize(
        ("key", "value", "culprit"),
        [
            ("model.lookahead", "0", "model.lookahead: got 0"),
            ("model.thought_length", "0", "model.thought_length: got 0"),
            ("model.thoughts_per_position", "1", "model.thoughts_per_position: got 1"),
            ("model.positions", "every:0", "model.positions: got 'every:0'"),
            ("training.learning_rat", "1", "--training.learning_rate"),
            ("textbook.operands", "1", "textbook.operands: got '1'"),
        ],
    )
    def test_options(
        self,
        base: Path,
        text: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        key: str,
        value: str,
        culprit: str,
    ) -> None:
        if key.startswith("textbook."):
            words = ["--output_dir", str(tmp_path / "run")]
        else:
            words = arguments(base, text, tmp_path / "run")
        assert culprit in error_of([*words, f"--{key}", value], capsys)
