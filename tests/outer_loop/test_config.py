"""The options of the two commands: help, presets, what is refused, and dry runs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quietstar import star, vstar
from quietstar.config.command_line import Command, parse_config
from quietstar.config.commands import STAR, VSTAR
from quietstar.config.loops import EMBEDDED, OuterLoopConfig, fine_tuning_steps, parse_ks
from quietstar.errors import ConfigError
from tests.outer_loop.loops import arguments

COMMANDS = {"star": (STAR, star.main), "vstar": (VSTAR, vstar.main)}
PRESETS = [(name, preset) for name, (command, _) in COMMANDS.items() for preset in command.presets]


def parsed(name: str, preset: str, *more: str) -> OuterLoopConfig:
    command: Command[OuterLoopConfig] = COMMANDS[name][0]
    model = [] if preset in EMBEDDED else ["--model.path", "anything"]
    return parse_config(command, ["--preset", preset, *model, *more])


def options(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from options(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, main = COMMANDS[name]
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    described = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    assert described >= set(options(OuterLoopConfig()))
    assert set(command.presets) == set(command.descriptions)
    assert all(f"  {preset} " in text for preset in command.presets)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_are_valid(name: str, preset: str) -> None:
    known = set(options(OuterLoopConfig()))
    assert set(COMMANDS[name][0].presets[preset]) <= known
    config = parsed(name, preset)
    assert config.preset == preset


def test_the_preset_where_none_is_given() -> None:
    for command in (STAR, VSTAR):
        assert parse_config(command, []).preset in EMBEDDED
        assert parse_config(command, ["--model.path", "x"]).preset == "plain"


def test_star_paper() -> None:
    """arXiv 2203.14465, section 3.1 and appendix H."""
    config = parsed("star", "star-paper")
    steps = [fine_tuning_steps(i, config.loop, 1, config.training.batch_size) for i in range(1, 17)]
    assert steps[:4] == [40, 48, 57, 69] and sum(steps) == 3_490 and config.loop.iterations == 16
    assert (config.sampling.samples, config.sampling.temperature, config.sampling.max_new_tokens) == (1, 0.0, 96)
    assert config.loop.rationalize and config.loop.start_from == "base" and config.loop.accumulate == "last"
    training = config.training
    assert (training.learning_rate, training.warmup_steps, training.schedule) == (1e-6, 100, "constant")
    assert (training.batch_size, config.loop.row_length, training.weight_decay) == (8, 1024, 0.0)
    assert config.problems.limit == 10_000 and config.sampling.few_shot
    without = parsed("star", "star-no-rationalization")
    assert not without.loop.rationalize
    without.loop.rationalize, without.preset = True, "star-paper"
    assert without == config


def test_one_round_of_rejection_sampling() -> None:
    """arXiv 2308.01825: 100 samples at 0.7, distinct by their equations; 2312.06585: 32 of the 40 likeliest, cap 10."""
    rft = parsed("star", "rft")
    assert (rft.sampling.samples, rft.sampling.temperature, rft.loop.iterations) == (100, 0.7, 1)
    assert rft.loop.deduplicate == "solution" and rft.loop.supervised_start and not rft.loop.rationalize
    assert (rft.loop.start_epochs, rft.training.learning_rate) == (3.0, 2e-5)
    rest = parsed("star", "rest-em")
    assert (rest.sampling.samples, rest.sampling.temperature, rest.sampling.top_k) == (32, 0.7, 40)
    assert (rest.loop.max_per_problem, rest.loop.iterations, rest.loop.start_from) == (10, 3, "base")
    assert not rest.loop.rationalize


def test_vstar() -> None:
    """arXiv 2402.06457: 3 times 16 samples, or 48 at once; everything that was right stays; 128 candidates."""
    three, one = parsed("vstar", "vstar"), parsed("vstar", "vstar-1-iteration")
    assert (three.loop.iterations, three.sampling.samples) == (3, 16)
    assert (one.loop.iterations, one.sampling.samples) == (1, 48)
    for config in (three, one):
        assert config.loop.accumulate == "all" and config.loop.start_from == "base" and not config.loop.rationalize
        assert config.loop.supervised_start and config.loop.demonstrations and config.evaluation.candidates == 128
        assert (config.verifier.score, config.verifier.nll_weight) == ("sum", 0.0)


REFUSED = {
    "sampling.samples": ("4", "at temperature 0 all samples of a problem are the same"),
    "sampling.temperature": ("-1", "needs a finite number above 0, at least 1e-30, or 0 (greedy)"),
    "sampling.top_p": ("1.5", "needs more than 0 and at most 1"),
    "sampling.max_new_tokens": ("0", "needs at least 1"),
    "loop.iterations": ("0", "leaves nothing to do"),
    "loop.rationalization_fraction": ("1.5", "needs 0 to 1"),
    "loop.growth": ("0", "needs a finite number above 0"),
    "loop.schedule": ("cubic", "needs one of exponential, linear, epochs"),
    "loop.start_from": ("last", "needs one of base, previous"),
    "verifier.beta": ("0", "needs a finite number above 0"),
    "verifier.micro_batch_size": ("5", "does not divide verifier.batch_size"),
    "evaluation.ks": ("1,x", "needs whole numbers from 1 with commas"),
    "problems.timeout": ("0", "needs a finite number above 0"),
    "training.batch_size": ("0", "needs"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_values_that_are_refused(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, message = REFUSED[key]
    assert star.main(["--model.path", "x", f"--{key}", value]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {key}: got ") and message in text and text.count("\n") == 1


def test_models_of_embedded_defaults() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: missing; preset star-paper needs a causal language model"):
        parse_config(STAR, ["--preset", "star-paper"])
    with pytest.raises(ConfigError, match=r"model\.path: got 'x', but preset addition makes its own model"):
        parse_config(STAR, ["--preset", "addition", "--model.path", "x"])
    with pytest.raises(ConfigError, match=r"preset: got 'star-papers', needs one of .*did you mean star-paper\?"):
        parse_config(STAR, ["--preset", "star-papers"])


def test_ks() -> None:
    assert parse_ks("8, 1,2,2,") == [1, 2, 8]
    for text in ("", "0,1", "-1", "1;2", "1.5"):
        with pytest.raises(ConfigError, match=r"evaluation\.ks"):
            parse_ks(text)


def test_a_dry_run_reads_no_weights(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And writes nothing."""
    model = tmp_path / "model"
    shutil.copytree(adder, model, ignore=shutil.ignore_patterns("*.safetensors"))
    command = arguments(model, tmp_path / "run", dry_run="true", loop__iterations=3, loop__schedule="exponential")
    for _, main in COMMANDS.values():
        assert main(command) == 0
        text = capsys.readouterr().out
        assert "task addition: 100 training problems, 100 held out; 6 drawn for each iteration" in text
        assert "samples: 24 an iteration, 3 iterations" in text and "fine-tuning steps: 4, 4, 5; 13 in all" in text
        assert '"0+0="' in text and '"0+0?00="' in text
        assert "prompts: 4 tokens in the middle, 4 at most" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_the_embedded_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert star.main(["--dry_run"]) == 0
    loop = parse_config(STAR, []).loop
    steps = ", ".join(str(fine_tuning_steps(i, loop, 1, 1)) for i in range(1, loop.iterations + 1))
    assert f"fine-tuning steps: {steps}; " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
