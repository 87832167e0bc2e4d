"""Every command and every piece of Python in README.md and docs/ runs, with few steps, tiny models and small texts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from quietstar.__main__ import main as quietstar_command
from quietstar.demos import textbook as experiment
from tests.distributed.launch import launched
from tests.docs.pages import ROOT, blocks, commands
from tests.docs.readers_files import (
    LETTERS,
    MODEL,
    TRAINED,
    VERIFIER,
    write_letters,
    write_loop_inputs,
    write_model,
    write_texts,
    write_trained_model,
)

# README.md's first two lines install what they run. .ci/run executes the second as it stands, and in it
# tests/demos/test_experiment.py runs the first one's job, without its controls.
INSTALLS = ("python -m venv ",)
DEFAULT = "python -m quietstar.train"
SCRIPTS = ("python examples/", "python benchmarks/")
ON_RANKS = ("torchrun ",)
RUN_HERE = [one for one in commands() if one != DEFAULT and not one.startswith((*INSTALLS, *SCRIPTS, *ON_RANKS))]

FEW_STEPS = (
    "--training.steps 2 --training.batch_size 2 --training.eval_batches 1 --data.length 16 --data.append_eos false "
    "--model.thought_length 2 --model.lookahead 2 --training.threads 1"
)
LOOPS = ("quietstar.star", "quietstar.vstar", "quietstar.compare", "quietstar.rank")


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def test_the_readme_begins_with_its_two_commands() -> None:
    first, second = (shlex.join(shlex.split(code)) for path, code in blocks("bash")[:2] if path == "README.md")
    assert first.endswith("python -m quietstar.train") and second.endswith("pytest -n auto")
    assert {one for one in commands() if one.startswith(INSTALLS)} == {first, second}


@pytest.mark.slow
@pytest.mark.parametrize("command", [one for one in RUN_HERE if not one.endswith(("--help", "--print_config"))])
def test_every_command_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(MODEL)
    write_texts()
    if TRAINED in command:
        write_trained_model()
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], command
    module, arguments = words[2], words[3:]
    own_model = MODEL
    if module in LOOPS:
        own_model = LETTERS
        write_loop_inputs()
        if module != "quietstar.rank" and "--dry_run" not in arguments:
            arguments.append("--dry_run")  # tests/outer_loop runs the loops; here every option is read, and the data
    arguments = [own_model if word == "path/or/hub-name" else word for word in arguments]
    if module == "quietstar.train":
        arguments += [*FEW_STEPS.split(), "--model.start_text", "[", "--model.end_text", "]", "--output_dir", "run"]
        if "mistral-7b" in arguments:  # neither the model nor OpenWebMath is here: the preset runs on ours
            arguments += ["--model.path", MODEL, "--data.path", "my-text.jsonl", "--data.field", "body"]
    if module == "quietstar.plan" and MODEL in arguments:
        arguments += ["--data.length", "16", "--training.batch_size", "2"]
    if module == "quietstar.sweep":
        monkeypatch.setattr(experiment, "HELD_OUT_TEXTS", 4)
        arguments += ["--textbook.seeds", "1", "--textbook.pretraining_steps", "2", "--training.steps", "2"]
        arguments += ["--training.batch_size", "2", "--training.eval_every", "0", "--training.threads", "1"]
    assert import_module(module).main(arguments) == 0
    assert capsys.readouterr().out
    if module == "quietstar.train":
        assert Path("run/report.html").is_file() and Path("run/checkpoints/step-00000002").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("command", [one for one in commands() if one.startswith(ON_RANKS)])
def test_every_command_of_several_ranks_runs(command: str, tmp_path: Path) -> None:
    """On two ranks of this machine, whatever machines and ranks the page has."""
    write_model(MODEL)
    write_texts()
    module, *arguments = shlex.split(command.partition(" -m ")[2])
    arguments = [MODEL if word == "path/or/hub-name" else word for word in arguments]
    arguments += [*FEW_STEPS.split(), "--model.start_text", "[", "--model.end_text", "]", "--output_dir", "run"]
    Path("run.yaml").write_text(f"model: {{path: {MODEL}}}\ndata: {{path: my-text.txt}}\n")
    assert launched(2, module, *arguments, directory=tmp_path).count("report: ") == 1
    assert len(list(Path("run/checkpoints/step-00000002/training").iterdir())) == 2


@pytest.mark.parametrize("command", [one for one in RUN_HERE if one.endswith(("--help", "--print_config"))])
def test_every_question_is_answered(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    arguments = words[1:] if words[0] == "quietstar" else [words[2].partition(".")[2], *words[3:]]
    try:
        status = quietstar_command(arguments)
    except SystemExit as stop:
        status = stop.code
    assert not status and capsys.readouterr().out


@pytest.mark.parametrize("command", [one for one in commands() if one.startswith(SCRIPTS)])
def test_every_script_is_there_and_has_a_test(command: str) -> None:
    """Examples take half a minute and benchmarks minutes to hours: their own tests run them."""
    scripts = re.findall(r"python (\S+\.py)", command)
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file()
        if script.startswith("examples/"):
            assert Path(script).name in (ROOT / "tests/test_examples.py").read_text(encoding="utf-8")
        else:
            assert (ROOT / "tests" / script.replace("benchmarks/", "benchmarks/test_")).is_file()


PYTHON = blocks("python")


@pytest.mark.parametrize(
    "code", [code for _, code in PYTHON], ids=[f"{path}-{n}" for n, (path, _) in enumerate(PYTHON)]
)
def test_every_piece_of_python_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "path/or/hub-name" in code:
        write_model(MODEL)
    if TRAINED in code:
        write_trained_model()
    if VERIFIER in code:
        write_letters(VERIFIER)
    # The character model knows 13 characters and not "---"; the rest runs as it stands.
    code = code.replace('"path/or/hub-name"', f'"{MODEL}", start_text="[", end_text="]"')
    code = re.sub(r"torch\.tensor\(\[\[.*?\]\]\)", "torch.tensor([[5, 7, 4, 7, 1, 8, 3, 12]])", code)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code, names)
    printed = capsys.readouterr().out
    if "logits" in names:
        assert tuple(names["logits"].shape) == (1, 8, 13)
        assert Path("thinking/config.json").is_file() and ("plain" in code) == Path("plain/config.json").is_file()
    if "output" in names:
        assert names["output"].sequences.shape == (1, 16)
        assert printed.startswith("2+6+4+3=") and "8 tokens in" in printed and "thought at" in printed
    if "scores" in names:
        assert len(names["scores"]) == 2 and all(score < 0 for score in names["scores"])
    if "task" in names:
        assert printed.startswith("80 + 80 = ") and "answer='160', correct=True" in printed
    if "nll" in names:
        assert names["out"].shape == (2, 6, 4, 8, 64) and names["nll"].shape == (48,)
        assert names["lm_head"].grad is not None
    if "PRESETS" in code:
        assert all(preset in printed for preset in ("default", "paper", "authors"))
    if "optimizer" in names:
        assert printed.count("tensor(") == 3
