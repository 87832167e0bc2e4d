"""The command line: who wins, what a typing error is told, and that what is saved is what is read."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.__main__ import main
from quietstar.config.command_line import to_yaml
from quietstar.config.commands import load_config, parse_train_config
from quietstar.config.presets import TRAIN_PRESETS
from quietstar.config.training import TrainConfig
from quietstar.errors import ConfigError, DataError, run_command

INPUT = ["--model.path", "some/model", "--data.path", "some.txt"]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        key
        for name, value in tree.items()
        for key in (keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    ]


def test_no_argument_is_the_embedded_default() -> None:
    config = parse_train_config([])
    assert config == parse_train_config(["--preset", "textbook"])
    assert config.preset == "textbook"


def test_own_input_is_the_plain_preset() -> None:
    config = parse_train_config(INPUT)
    assert (config.preset, config.model.path, config.data.path) == ("plain", "some/model", "some.txt")


def test_flags_have_the_types_of_their_options() -> None:
    config = parse_train_config(
        [
            *INPUT,
            *("--training.learning_rate=1e-5", "--model.lookahead", "3", "--training.resume", "false"),
            *("--model.initial_mixing_weight", "null", "--model.start_text", "1e3", "--objective.baseline", "mean"),
            "--objective.clamp_negative_advantage=true",
        ]
    )
    assert config.training.learning_rate == 1e-5
    assert config.model.lookahead == 3
    assert config.training.resume is False
    assert config.model.initial_mixing_weight is None
    assert config.model.start_text == "1e3"
    assert (config.objective.baseline, config.objective.clamp_negative_advantage) == ("mean", True)


@pytest.mark.parametrize("arguments", [["--model.end_text", "---"], ["--model.end_text=--x=y"], ["--data.field", ""]])
def test_a_value_may_look_like_an_option(arguments: list[str]) -> None:
    parse = parse_train_config
    if arguments[-1] == "":
        with pytest.raises(ConfigError, match=r"data\.field: got an empty text"):
            parse([*INPUT, *arguments])
    else:
        assert parse([*INPUT, *arguments]).model.end_text in ("---", "--x=y")


def test_a_yes_or_no_option_alone_means_yes() -> None:
    config = parse_train_config([*INPUT, "--training.override", "--training.allow_partial", "--training.seed", "3"])
    assert (config.training.override, config.training.allow_partial, config.training.seed) == (True, True, 3)
    assert not parse_train_config([*INPUT, "--training.keep_best", "false"]).training.keep_best


def test_the_papers_preset() -> None:
    config = parse_train_config(["--preset", "mistral-7b", "--data.path", "web.jsonl"])
    model, training = config.model, config.training
    assert (model.path, model.dtype) == ("mistralai/Mistral-7B-v0.1", "bfloat16")
    assert (model.thought_length, model.lookahead, model.thoughts_per_position) == (9, 4, 2)
    assert (model.initial_mixing_weight, model.embedding_scale, model.interpolation) == (None, 100.0, "logits")
    assert (training.batch_size, training.learning_rate, training.warmup_steps, training.weight_decay) == (
        8, 1e-6, 20, 0.001
    )  # fmt: skip
    assert (config.objective.preset, config.data.length) == ("authors", 256)


def test_flags_win_over_the_file_over_the_preset_over_the_defaults_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {lookahead: 6, thought_length: 5}\ndata: {path: file.txt}\n")
    flags = ["--model.thought_length", "3"]
    for arguments in (
        ["--preset", "mistral-7b", "--config", path, *flags],
        [*flags, "--config", path, "--preset", "mistral-7b"],
    ):
        config = parse_train_config(arguments)
        assert config.model.thought_length == 3  # flag
        assert config.model.lookahead == 6  # file
        assert config.model.embedding_scale == 100.0  # preset
        assert config.training.log_every == TrainConfig().training.log_every
        assert (config.preset, config.data.path) == ("mistral-7b", "file.txt")


def test_the_file_can_name_the_preset_and_a_flag_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "preset: mistral-7b\ndata: {path: a.txt}\n")
    assert load_config(path).model.thought_length == 9
    config = parse_train_config(["--config", path, "--preset", "plain", "--model.path", "m"])
    assert (config.preset, config.model.thought_length) == ("plain", TrainConfig().model.thought_length)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "1"], "unknown option --learning_rate; did you mean --training.learning_rate?"),
        (["--training.learning-rate", "1"], "did you mean --training.learning_rate?"),
        (["--trainig.lerning_rate=1"], "did you mean --training.learning_rate?"),
        (["--model.learning_rate", "1"], "did you mean --training.learning_rate?"),
        (["--path", "x"], "unknown option --path; did you mean --model.path or --data.path?"),
        (["--print-config"], "did you mean --print_config?"),
        (["--conifg", "x"], "did you mean --config?"),
        (["--qqqq", "1"], "unknown option --qqqq; --help lists every option"),
        (["--model", "x"], "unknown option --model"),
        (["some/model"], "unexpected argument 'some/model'; --help lists every option"),
        (["model.path=x"], "unexpected argument 'model.path=x'; an option is written --model.path VALUE"),
        (["--training.seed"], "training.seed: got no value, needs one: --training.seed VALUE"),
        (["--data.field", "--training.seed", "1"], "data.field: got no value"),
        (["--training.seed", "one"], "training.seed: got 'one', needs a whole number"),
        (["--training.steps", "2.5"], "training.steps: got '2.5', needs a whole number"),
        (["--training.steps", "null"], "training.steps: got 'null', needs a whole number"),
        (["--training.steps", "true"], "training.steps: got 'true', needs a whole number"),
        (["--training.threads", "many"], "training.threads: got 'many', needs a whole number or null"),
        (["--training.learning_rate", "fast"], "training.learning_rate: got 'fast', needs a number"),
        (["--training.resume", "maybe"], "training.resume: got 'maybe', needs true or false"),
        (["--model.dtype", "float16"], "model.dtype: got 'float16', needs one of float32, bfloat16"),
        (["--objective.baseline", "x"], "objective.baseline: got 'x', needs one of leave_one_out, mean, none or null"),
        (["--model.lookahead", "0"], "model.lookahead: got 0, needs at least 1"),
        (
            ["--preset", "mistral7b"],
            "preset: got 'mistral7b', needs one of textbook, plain, mistral-7b, pause-tokens; did you",
        ),
        (["--print_config=yes"], "print_config: takes no value, got 'yes'"),
        (["--config", "a", "--config", "b"], "config: given twice (a and b), needs one"),
        (["-steps", "3"], "unknown option -steps; an option begins with two dashes"),
        (["--training.learn", "3"], "did you mean --training.learning_rate?"),
        (["--config", "/no/such.yaml"], "config: cannot read /no/such.yaml: No such file or directory"),
        (["--preset", "plain", "--model.path", "m"], "data.path: missing; preset plain needs a text to train on"),
        (["--preset", "textbook", "--data.path", "x"], "data.path: got 'x', but preset textbook makes its own"),
        (["--model.path", "x"], "data.path: missing; preset plain needs a text to train on"),
    ],
)
def test_a_bad_argument_is_told_what_was_meant(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train_config(arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {lookahed: 3}", "a.yaml: unknown option model.lookahed; did you mean model.lookahead?"),
        ("modl: {lookahead: 3}", "a.yaml: unknown option modl.lookahead; did you mean model.lookahead?"),
        ("learning_rate: 3", "a.yaml: unknown option learning_rate; did you mean training.learning_rate?"),
        ("model: 3", "a.yaml: model: got 3, needs a mapping of options"),
        ("model: {lookahead: {a: 1}}", "a.yaml: model.lookahead: got {'a': 1}, needs a whole number"),
        ("model: {lookahead: a}", "a.yaml: model.lookahead: got 'a', needs a whole number"),
        ("training: {seed: true}", "a.yaml: training.seed: got True, needs a whole number"),
        ("training: {resume: 1}", "a.yaml: training.resume: got 1, needs true or false"),
        ("model: {start_text: 5}", "a.yaml: model.start_text: got 5, needs a text"),
        ("training: [1]", "a.yaml: training: got [1], needs a mapping of options"),
        ("model: {start_text: null}", "a.yaml: model.start_text: got None, needs a text"),
        ("preset: [a]", "preset: got ['a'], needs one of"),
        ("- model", "a.yaml holds a list, needs a mapping of options"),
        ("model: [", "a.yaml:2: not valid YAML"),
        ("model: \0", "a.yaml: not valid YAML: "),
        ("x: &a {y: *a}", "a.yaml:1: not valid YAML: "),
        ("{" * 3000, "a.yaml:1: not valid YAML: "),
        ("a: b\nmodel: }", "a.yaml:2: not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "a.yaml:1: not valid YAML: could not determine a constructor"),
        ("1: 2", "a.yaml: unknown option 1"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError) as caught:
        parse_train_config(["--config", path])
    assert message in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not UTF-8 text: .* at byte 16"):
        load_config(tmp_path / "a.yaml")


def test_numbers_in_a_file_may_be_written_as_on_the_command_line(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-6 as text, which has surprised users of every tool that stops there."""
    path = write(tmp_path / "a.yaml", "training: {learning_rate: 1e-6, adam_beta1: 0}\n")
    config = load_config(path)
    assert config.training.learning_rate == 1e-6
    assert config.training.adam_beta1 == 0.0
    assert isinstance(config.training.adam_beta1, float)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    for text in ("", "# nothing yet\n", "model:\n  # lookahead: 3\ntraining: {}\n"):
        assert load_config(write(tmp_path / "a.yaml", text)) == parse_train_config([])


@pytest.mark.parametrize("preset", list(TRAIN_PRESETS))
def test_print_config_gives_a_file_that_config_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    arguments = ["--preset", preset] + (INPUT if preset != "textbook" else [])
    with pytest.raises(SystemExit) as stop:
        parse_train_config([*arguments, "--training.seed", "7", "--print_config"])
    assert stop.value.code == 0
    path = write(tmp_path / "a.yaml", capsys.readouterr().out)
    assert load_config(path) == parse_train_config([*arguments, "--training.seed", "7"])


def test_print_config_needs_no_input_yet_but_valid_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train_config(["--preset", "mistral-7b", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["path"] is None
    with pytest.raises(ConfigError, match=r"model\.lookahead: got 0"):
        parse_train_config(["--preset", "mistral-7b", "--model.lookahead", "0", "--print_config"])


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=40)
@given(
    text=texts | st.sampled_from(["null", "true", "1e3", "007", "---", "~", "a: b", "# c", "\n", "\x85", "\ufeff x"]),
    rate=st.floats(min_value=5e-324, max_value=1e300),
    weight=st.none() | st.floats(-1e9, 1e9),
    seed=st.integers(0, 2**32 - 1),
    threads=st.none() | st.integers(1, 99),
    flag=st.booleans(),
    baseline=st.sampled_from([None, "leave_one_out", "mean", "none"]),
)
def test_a_saved_configuration_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    rate: float,
    weight: float | None,
    seed: int,
    threads: int | None,
    flag: bool,
    baseline: Any,
) -> None:
    config = TrainConfig(preset="plain", output_dir=text)
    config.model.path, config.data.path, config.model.start_text = text, "x", text
    config.training.learning_rate, config.model.initial_mixing_weight = rate, weight
    config.training.seed, config.training.threads, config.training.resume = seed, threads, flag
    config.objective.baseline, config.objective.clamp_negative_advantage = baseline, flag
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_the_saved_configuration_lists_every_option() -> None:
    assert yaml.safe_load(to_yaml(TrainConfig())) == dataclasses.asdict(TrainConfig())


def test_help_shows_every_option_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train_config(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for key in keys(dataclasses.asdict(TrainConfig())):
        assert f"--{key} " in shown
        _, _, meaning = shown.partition(f"--{key} ")
        entry = meaning.split("\n  --")[0]
        assert len(entry.partition("(type:")[0].split()) > 2, f"{key} has no help"
    for preset in TRAIN_PRESETS:
        assert f"  {preset} " in shown


def test_help_shows_the_values_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train_config(["-h", "--preset", "mistral-7b"])
    assert "mistralai/Mistral-7B-v0.1" in capsys.readouterr().out


def test_a_problem_with_the_input_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise DataError("a.txt:3: not UTF-8 text")

    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: a.txt:3: not UTF-8 text\n"
    assert run_command(lambda: None) == 0


def test_a_bug_keeps_its_traceback() -> None:
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "error: unknown command 'tarin'; did you mean train?"),
        (["zzz"], "error: unknown command 'zzz'; --help lists the commands"),
        ([], "error: no command; --help lists the commands"),
    ],
)
def test_a_bad_command(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == message + "\n"


def test_the_quietstar_command_lists_its_commands_and_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "quietstar train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("quietstar ")


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["quietstar", "tarin"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("quietstar", run_name="__main__")
    assert stop.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err
