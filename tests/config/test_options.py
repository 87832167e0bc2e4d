"""Bounds beside the fields, and the command line of every command, which is made from its dataclass of options."""

from __future__ import annotations

import dataclasses
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from quietstar.__main__ import COMMANDS
from quietstar.config import options
from quietstar.config.command_line import Command, option_names, parse_config, with_text
from quietstar.config.commands import COMPARE, PLAN, STAR, TRAIN, VSTAR, of_preset
from quietstar.config.options import Count, Names, Positive, Text, Words, at_least, check, within
from quietstar.demos.options import SWEEP
from quietstar.errors import ConfigError
from quietstar.evaluation.settings import EVALUATE
from quietstar.inference.commands import GATE, GENERATE, VIEW
from quietstar.reporting.comparison_report import REPORT_COMMAND
from quietstar.verifiers.ranking import RANK

ALL = (TRAIN, STAR, VSTAR, GENERATE, EVALUATE, VIEW, GATE, RANK, COMPARE, PLAN, REPORT_COMMAND, SWEEP)
NEEDED = {
    "generate": ["a/b"],
    "evaluate": ["a/b", "--text", "held-out.txt"],
    "view": ["a/b", "--text", "-"],
    "gate": ["a/b", "--text", "x.txt", "--out", "gated"],
    "rank": ["--candidates", "c.jsonl"],
    "report": ["runs/x"],
}
"""Arguments that a command does not do without."""


@dataclasses.dataclass
class Inner:
    """A group.

    Args:
        share: Part of the whole.
    """

    share: Annotated[float, within(0, 1)] = 0.5


@dataclasses.dataclass
class Tree:
    """What is checked here.

    It does nothing.

    Args:
        count: Number of things.
        even: Number of things from 2, or null.
        rate: Speed in things per second.
        kind: What they are.
        stop: Words that end it.
        names: Names with commas.
        words: One word or several.
        loud: Say it aloud.
        place: File of the things.
        inner: A group.
    """

    count: Count = 1
    even: Annotated[int, at_least(2)] | None = None
    rate: Positive = 1.0
    kind: Literal["a", "b"] = "a"
    stop: tuple[Text, ...] = ()
    names: Names = ()
    words: Words = ()
    loud: bool = False
    place: str = "here"
    inner: Inner = dataclasses.field(default_factory=Inner)


THINGS = Command("things", Tree, argument="place")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "x.count: got 0, needs at least 1"),
        ({"even": 1}, "x.even: got 1, needs at least 2"),
        ({"rate": 0.0}, "x.rate: got 0.0, needs a finite number above 0"),
        ({"rate": math.nan}, "x.rate: got nan, needs a finite number above 0"),
        ({"rate": math.inf}, "x.rate: got inf, needs a finite number above 0"),
        ({"kind": "c"}, "x.kind: got 'c', needs one of a, b"),
        ({"stop": ("a", "")}, "x.stop: got an empty text, needs at least one character"),
        ({"inner": Inner(1.5)}, "x.inner.share: got 1.5, needs 0 to 1"),
    ],
)
def test_a_value_outside_of_its_bound_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Tree(**values), "x.")
    assert str(caught.value) == message


def test_values_at_their_bounds_are_allowed() -> None:
    check(Tree(count=1, even=2, rate=5e-324, kind="b", stop=(" ",), inner=Inner(0.0)))
    check(Tree(inner=Inner(1.0)))
    number_types = [getattr(options, name) for name in ("ShareBelow1", "ShareAbove0", "ProperShare")]
    for kind, allowed in zip(number_types, ([0.0], [1.0], []), strict=True):
        (bound,) = options.bounds(kind)
        assert [value for value in (0.0, 1.0) if bound.allows(value)] == allowed
        assert bound.allows(0.5) and not any(map(bound.allows, (-0.1, 1.1, math.nan)))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["there"], {"place": "there"}),
        (["--loud", "there"], {"loud": True, "place": "there"}),
        (["--loud", "false", "there"], {"loud": False, "place": "there"}),
        (["--place", "there", "--loud"], {"loud": True, "place": "there"}),
        (["--stop", "a,b", "--stop=--c"], {"stop": ("a,b", "--c")}),
        (["--names", "a, b,", "--names=c"], {"names": ("a", "b", "c")}),
        (["--words", "a=1,2", "b=3", "--words=c", "--count", "2"], {"words": ("a=1,2", "b=3", "c"), "count": 2}),
        (["--inner.share=1", "--even", "null"], {"inner": Inner(1.0), "even": None}),
    ],
)
def test_how_options_are_written(words: list[str], wanted: dict[str, Any]) -> None:
    assert parse_config(THINGS, words) == dataclasses.replace(Tree(), **wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "unexpected argument 'b'; --help lists every option"),
        (["--names"], "names: got no value, needs one: --names VALUE"),
        (["--rate", ".nan"], "rate: got nan, needs a finite number above 0"),
        (["--kind", "c"], "kind: got 'c', needs one of a, b"),
        (["--word", "x"], "unknown option --word; did you mean --words?"),
    ],
)
def test_how_options_are_not_written(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(THINGS, words)
    assert str(caught.value) == message


def test_lists_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("stop: [a, 'b,c']\nnames: a, b\nwords: one\n")
    assert parse_config(THINGS, ["--config", str(file)]) == Tree(stop=("a", "b,c"), names=("a", "b"), words=("one",))
    file.write_text("stop: [1]\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: stop: got \[1\], needs a list of texts"):
        parse_config(THINGS, ["--config", str(file)])


def test_one_option_is_changed_as_its_text_says() -> None:
    tree = Tree(count=3)
    assert with_text(THINGS, tree, "inner.share", "0.25") == Tree(count=3, inner=Inner(0.25))
    assert tree == Tree(count=3)
    with pytest.raises(ConfigError, match=r"inner\.share: got 2\.0, needs 0 to 1"):
        with_text(THINGS, tree, "inner.share", "2")


def test_help_shows_the_docstring_and_the_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_config(THINGS, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: python -m quietstar.things PLACE [--config FILE] [--KEY VALUE ...]")
    assert "What is checked here. It does nothing." in shown
    assert "Number of things. Needs at least 1. (type: int, default: 1)" in shown
    assert "Part of the whole. Needs 0 to 1." in shown


def test_there_is_one_for_each_command() -> None:
    assert [command.name for command in ALL] == list(COMMANDS)


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.name)
def test_every_command_explains_and_prints_its_options(
    command: Command[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module(f"quietstar.{command.name}").main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m quietstar.{command.name}")
    for key in option_names(command.config):
        entry = shown.partition(f"--{key} ")[2].split("\n  --")[0]
        assert len(entry.partition("(type:")[0].split()) > 2, f"{key} has no help"
    if not command.takes_preset:
        return  # it prints no options: they are of several runs
    with pytest.raises(SystemExit, match="0"):
        main([*NEEDED.get(command.name, []), "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    again = parse_config(command, ["--config", str(file)])
    wanted = parse_config(command, NEEDED.get(command.name, []))
    if command is GENERATE:  # a new seed each time
        wanted = dataclasses.replace(wanted, seed=again.seed)
    assert again == wanted
    left_out = {"seed"} if command is GENERATE else set()
    if command.takes is not None:
        left_out = set(option_names(command.config)) - set(option_names(command.takes))
    printed = {key.partition(".")[0] for key in option_names(command.config)} - left_out
    assert set(yaml.safe_load(file.read_text())) == printed


def test_what_is_printed_may_lack_what_has_to_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_config(GATE, ["--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["out"] is None
    with pytest.raises(ConfigError, match="checkpoint: missing, needs a value: CHECKPOINT"):
        parse_config(GATE, [])


def test_each_preset_of_a_comparison_has_its_own_values(tmp_path: Path) -> None:
    words = ["--presets", "rft, rest-em", "--model.path", "a/b", "--sampling.max_new_tokens", "9"]
    first, second = (parse_config(command, words) for command in (COMPARE, of_preset("rest-em")))
    assert (first.preset, first.presets, first.sampling.samples) == ("rft", ("rft", "rest-em"), 100)
    assert (second.preset, second.sampling.samples, second.sampling.max_new_tokens) == ("rest-em", 32, 9)
    file = tmp_path / "a.yaml"
    file.write_text("presets: vstar, rft\nmodel: {path: a/b}\n")
    assert parse_config(COMPARE, ["--config", str(file)]).preset == "vstar"


@pytest.mark.parametrize("words", [["--preset", "addition"], ["--config", "p.yaml"]])
def test_a_comparison_names_its_presets_itself(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset in a file went before that of each run: all runs were of one preset, under the names of the others."""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("preset: addition\n")
    with pytest.raises(ConfigError, match="preset: got 'addition', needs --presets NAME,NAME"):
        parse_config(of_preset("routes"), ["--presets", "addition,routes", *words])
    with pytest.raises(ConfigError, match="print_config: compare runs several presets"):
        parse_config(COMPARE, ["--presets", "addition,routes", "--print_config"])


@pytest.mark.parametrize("presets", ["5", "{a: b}", "[]"])
def test_presets_in_a_file_have_to_be_names(presets: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"presets: {presets}\nmodel: {{path: a/b}}\n")
    if presets == "[]":
        assert parse_config(COMPARE, ["--config", str(file)]).presets == ()
    else:
        with pytest.raises(ConfigError, match=f"presets: got {re.escape(str(yaml.safe_load(presets)))}, needs a list"):
            parse_config(COMPARE, ["--config", str(file)])


@pytest.mark.parametrize("command", [PLAN, SWEEP], ids=lambda command: command.name)
@pytest.mark.parametrize("given", [[], ["--training.steps", "7"], ["--preset", "plain", "--data.field", "b.c"]])
def test_options_of_a_training_run_are_printed_for_it(
    command: Command[Any], given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan --print_config` wrote `gpu: null`, which `train --config` refused."""
    with pytest.raises(SystemExit):
        parse_config(command, [*given, "--print_config"])
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    for reader in (TRAIN, command):
        with pytest.raises(SystemExit):
            parse_config(reader, ["--config", str(tmp_path / "a.yaml"), "--print_config"])
        assert capsys.readouterr().out == (tmp_path / "a.yaml").read_text()


@pytest.mark.parametrize(
    ("command", "given", "line"),
    [
        (PLAN, ["--gpu", "H200"], "gpu: H200"),
        (PLAN, ["--json", "a.json"], "json: a.json"),
        (SWEEP, ["--vary", "steps=1,2"], "- steps=1,2"),
        (GENERATE, ["--seed", "4"], "seed: 4"),
        (GENERATE, ["--seed", "0"], "seed: 0"),
    ],
)
def test_what_is_given_is_printed(
    command: Command[Any], given: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(command, [*given, "--print_config"])
    assert line in capsys.readouterr().out.splitlines()


def test_a_drawn_seed_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each run with the printed file would have had the same seed, which nobody had chosen."""
    with pytest.raises(SystemExit):
        parse_config(GENERATE, ["--print_config"])
    assert "seed" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.name)
def test_help_is_written_for_users(command: Command[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """It had `--tasks [ITEM,...]`, `<class 'Path'>` and `Optional[Literal['parse', 'text']]`."""
    with pytest.raises(SystemExit, match="0"):
        parse_config(command, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for python in ("ITEM", "<class", "Optional[", "Literal[", "tuple[", "Union[", "default: ()", "default: ('"):
        assert python not in shown
    types = re.findall(r"\(type: ([^()]*?)(?:, default: |\))", shown)
    words = {"int", "float", "str", "bool", "path", "null", "list of texts"}
    assert len(types) >= len(option_names(command.config))
    assert all(one in words or one.startswith("one of ") for kind in types for one in kind.split(" | "))


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {parse_config(GENERATE, ["a/b"]).seed for _ in range(3)}
    assert len(seeds) == 3
    assert parse_config(GENERATE, ["a/b", "--seed", "5"]).seed == 5


TEMPERATURES = {
    key: command
    for command in (TRAIN, STAR, VSTAR, GENERATE, EVALUATE, VIEW)
    for key in (f"{command.name} {key}" for key in option_names(command.config) if key.endswith("temperature"))
}


@pytest.mark.parametrize("named", TEMPERATURES)
@pytest.mark.parametrize("value", ["1e-31", "1.0e-40", "5.0e-324", "-1.0e-30", ".inf", ".nan", "-1"])
def test_the_command_line_refuses_what_the_model_would(named: str, value: str) -> None:
    """`--temperature 1e-40` passed the command line, and was refused after torch and the model had been loaded."""
    command, key = TEMPERATURES[named], named.split()[1]
    preset = ["--preset", "plain"] if command in (STAR, VSTAR) else []
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: got .*needs a (finite )?number"):
        parse_config(command, [*NEEDED.get(command.name, []), *preset, f"--{key}", value])


def test_every_temperature_is_found() -> None:
    assert {"train model.temperature", "star sampling.temperature", "vstar evaluation.temperature"} <= set(TEMPERATURES)
    assert {"generate thought_temperature", "evaluate temperature", "view temperature"} <= set(TEMPERATURES)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (options.Count, (1, 2**40), (0, -1, 1.0, True, "1", None)),
        (options.Natural, (0, 7), (-1, 0.0, False)),
        (options.Temperature, (1, 1e-30, 5.5), (0, 9e-31, math.inf, math.nan, "1", True)),
        (options.TemperatureOr0, (0, 0.0, 1e-30), (-0.1, 1e-31, math.nan, None)),
        (options.ShareAbove0, (1, 0.5), (0, 1.5, math.nan, "x")),
        (options.Share, (0, 1), (-1e-9, 1 + 1e-9)),
        (options.Whole, (-(2**70), 0), (1.5, True, "3")),
    ],
)
def test_an_argument_of_any_type_is_held_to_the_bounds_of_options(
    kind: Any, right: tuple[Any, ...], wrong: tuple[Any, ...]
) -> None:
    for value in right:
        options.check_number("x", value, kind)
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^x: got {re.escape(repr(value))}, needs .*; thus"):
            options.check_number("x", value, kind, "; thus")
