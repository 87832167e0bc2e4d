"""What the README shows works as written, and its numbers are those of committed results."""

from __future__ import annotations

import json
import re
import shlex
import string
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from quietstar.demos.textbook import character_model, character_tokenizer
from quietstar.model.loading import character_tokenizer as letters
from quietstar.model.loading import small_llama
from quietstar.model.modeling import QuietStarForCausalLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Cells of every table row of a Markdown text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not set(line) <= set("|-: ")
    ]


def test_the_table_is_that_of_the_committed_result() -> None:
    result = rows((ROOT / "benchmarks/results/textbook.md").read_text(encoding="utf-8"))
    columns, arms = result[0], {row[0]: row for row in result[1:]}
    shown = [row for row in rows(README) if row[0] in arms]
    assert len(shown) == 5
    names = next(row for row in rows(README) if "answer NLL, with thought" in row)
    for row in shown:
        for name, cell in zip(names[1:], row[1:], strict=True):
            assert cell == arms[row[0]][columns.index(name)], (row[0], name)


def test_the_step_table_is_that_of_the_committed_result() -> None:
    result = {tuple(row) for row in rows((ROOT / "benchmarks/results/train_step.md").read_text(encoding="utf-8"))}
    cells = {cell for row in result for cell in row}
    names = next(row for row in rows(README) if row[0] == "text length")
    table = [row for row in rows(README) if row[0] in ("64", "128", "256", "512")]
    assert len(table) == 4 and len(names) == len(table[0])
    for row in table:
        for cell in row[1:]:
            for number in re.findall(r"[\d.]+", cell):
                assert number in cells, (row, number)


def test_the_plan_is_that_of_the_committed_result() -> None:
    result = rows((ROOT / "benchmarks/results/plan_mistral_7b.md").read_text(encoding="utf-8"))
    columns, settings = result[0], {row[0]: row for row in result[1:]}
    names = next(row for row in rows(README) if row[0] == "setting")
    shown = [row for row in rows(README) if row[0] in settings and len(row) == len(names)]
    assert len(shown) == 6
    for row in shown:
        assert row == [settings[row[0]][columns.index(name)] for name in names]


def test_claims_in_sentences_are_those_of_committed_results() -> None:
    accuracy = (ROOT / "benchmarks/results/plan_accuracy.md").read_text(encoding="utf-8")
    assert "largest error of 25 configurations is 0.4%" in accuracy and "within 0.4 % of [25 measured runs]" in README
    overhead = (ROOT / "benchmarks/results/trainer_overhead.md").read_text(encoding="utf-8")
    found = re.search(r"([\d.]+)% of the CPU time is spent outside the steps", overhead)
    assert found and float(found[1]) < 5 and f"takes {float(found[1]):.1f} % of the CPU time" in README
    startup = re.search(r"`quietstar --help` takes ([\d.]+) s of CPU time", overhead)
    assert startup and float(startup[1]) < 1.5
    assert not re.search(r"\b[A-Z]{4,}_TABLE\b", README)


def test_the_tables_of_the_loops_are_those_of_committed_results() -> None:
    for heading, name in (("| held-out accuracy, % |", "star"), ("| best of k candidates, % |", "vstar")):
        result = (ROOT / f"benchmarks/results/{name}.md").read_text(encoding="utf-8")
        rows = README[README.index(heading) :].split("\n\n")[0].splitlines()[2:]
        cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")[1:]]
        assert len(cells) > 20 and all(cell in result for cell in cells)


def test_the_table_of_generating_is_that_of_the_committed_result() -> None:
    result = (ROOT / "benchmarks/results/generation_cpu.md").read_text(encoding="utf-8")
    table = README[README.index("| tokens of a thought |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 3
    for row in table:
        length, limit, tiny, small, sixteen = (cell.strip() for cell in row.strip("|").split("|"))
        assert int(limit) == int(length) + 3
        for name, times in (("tiny", tiny), ("small", small)):
            claim = (
                f"{name}, context 256, T = {length}: {times} times the base's time for a token, at most {limit}: holds"
            )
            assert claim in result
        assert f"small, context 256, T = {length}: a step of 16 texts takes {sixteen} times that of one" in result


def test_what_is_said_of_the_gate_is_in_the_committed_result() -> None:
    gate = (ROOT / "benchmarks/results/gate.md").read_text(encoding="utf-8")
    kept = re.search(r"keeps ([\d.]+) % of the gain\s+with thoughts at ([\d.]+) % of the tokens", README)
    row = next(cells for cells in rows(gate) if cells[0] == "learned>0.1")
    assert kept and row[1].startswith(f"{kept[2]}%") and row[3].startswith(f"{kept[1]}%")
    alone = {cells[0]: cells for cells in rows(gate[gate.index("one at a time") :])}
    said = re.search(
        r"\(([\d.]+) %; without, ([\d.]+) %\), at ([\d.]+) of the base's\s+speed instead of ([\d.]+)", README
    )
    few, always, never = (alone[way] for way in ("learned>0.1", "always", "never"))
    assert said and said.groups() == (few[3][:-1], never[3][:-1], few[6], always[6]) and few[3] == always[3]


def shell_commands() -> list[str]:
    """Every line of the shell blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [shlex.join(words) for block in blocks for line in block.splitlines() if (words := shlex.split(line, True))]


# The first two lines of the README install what they run. .ci/run executes the second as it stands, and in it
# tests/demos/test_experiment.py runs the first one's job, without its controls. The rest runs here, with few steps
# and a tiny model and text for the reader's own.
COMMANDS = shell_commands()[2:]
FEW_STEPS = (
    "--training.steps 2 --training.batch_size 2 --training.eval_batches 1 --data.length 16 --data.append_eos false "
    "--model.thought_length 2 --model.lookahead 2 --training.threads 1"
)


LOOPS = ("quietstar.star", "quietstar.vstar", "quietstar.compare", "quietstar.rank")


def write_loop_inputs() -> None:
    """A model that can read letters, and problems of the two kinds that the README names."""
    tokenizer = letters(string.printable, "</s>")
    tokenizer.save_pretrained("letters")
    small_llama(0, len(tokenizer), layers=1, hidden_size=16, end=tokenizer.eos_token_id).save_pretrained("letters")
    problem = {"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7.\n#### 7", "solution": "3 + 4 = 7.\n#### 7"}
    Path("my-problems").mkdir()
    for split in ("train", "test"):
        Path(f"my-problems/{split}.jsonl").write_text(json.dumps(problem) + "\n")
    for name in ("my-problems.jsonl", "held-out.jsonl"):
        Path(name).write_text(json.dumps({**problem, "answer": "7"}) + "\n")
    candidates = {"prompt": "What is 3 + 4?", "completions": ["7", "8"]}
    Path("my-candidates.jsonl").write_text(json.dumps(candidates) + "\n")


TRAINED = "runs/textbook/seed-0/quietstar"


def write_trained_model() -> None:
    """A thinking model where the README's first command leaves one."""
    base, tokenizer = character_model(0), character_tokenizer()
    QuietStarForCausalLM.from_base(base, tokenizer, start_text="[", end_text="]", thought_length=2).save_pretrained(
        TRAINED
    )
    tokenizer.save_pretrained(TRAINED)
    (Path(TRAINED).parent / "held_out.txt").write_text("2+6+4+3=1\n0+0+0+1=1\n1+2+3+4=3\n" * 40)


def test_the_readme_begins_with_its_two_commands() -> None:
    first, second = shell_commands()[:2]
    assert first.endswith("python -m quietstar.train") and second.endswith("pytest -n auto")


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if "quietstar." in command])
def test_every_command_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    character_model(0).save_pretrained("model")
    character_tokenizer().save_pretrained("model")
    if TRAINED in command:
        write_trained_model()
    lines = ["2+6+4+3=1", "0+0+0+1=1", "1+2+3+4=3"] * 40
    Path("my-prompts.txt").write_text("2+6+4+3=\n0+0+0\n")
    Path("my-text.txt").write_text("\n".join(lines))
    Path("my-text.jsonl").write_text("".join(json.dumps({"body": line * 9}) + "\n" for line in lines))
    own_model = "model"
    if any(name in command for name in LOOPS):
        own_model = "letters"
        write_loop_inputs()
    words = shlex.split(command.replace("path/or/hub-name", own_model))
    assert words[:2] == ["python", "-m"], command
    module, arguments = words[2], words[3:]
    if module in LOOPS and module != "quietstar.rank" and "--dry_run" not in arguments:
        arguments.append("--dry_run")  # tests/outer_loop runs the loops; here every option is read, and the data
    if module == "quietstar.train":
        arguments += [*FEW_STEPS.split(), "--model.start_text", "[", "--model.end_text", "]", "--output_dir", "run"]
        if "mistral-7b" in arguments:  # neither the model nor OpenWebMath is here: the preset runs on ours
            arguments += ["--model.path", "model", "--data.path", "my-text.jsonl", "--data.field", "body"]
    if module == "quietstar.sweep":
        arguments += ["--textbook.seeds", "1", "--textbook.pretraining_steps", "2", "--training.steps", "2"]
    assert import_module(module).main(arguments) == 0
    assert capsys.readouterr().out
    if module == "quietstar.train":
        assert (tmp_path / "run/report.html").is_file() and (tmp_path / "run/checkpoints/step-00000002").is_dir()


@pytest.mark.parametrize("command", [command for command in COMMANDS if "benchmarks/" in command])
def test_every_benchmark_command_names_a_script_and_its_options(command: str) -> None:
    """They fill tables in minutes to hours; tests/benchmarks runs each script at a small size."""
    for script in re.findall(r"python (\S+\.py)", command):
        assert (ROOT / script).is_file()
        assert (ROOT / "tests" / script.replace("benchmarks/", "benchmarks/test_")).is_file()


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).is_file(), link


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "from_base" in block)
    base = tmp_path / "base"
    character_model(0).save_pretrained(base)
    character_tokenizer().save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    # The character model knows 13 characters and not "---"; the rest runs as it stands.
    code = code.replace('"path/or/hub-name"', f'{str(base)!r}, start_text="[", end_text="]"')
    code = re.sub(r"torch\.tensor\(\[\[.*?\]\]\)", "torch.tensor([[5, 7, 4, 7, 1, 8, 3, 12]])", code)
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["logits"].shape) == (1, 8, 13)
    assert (tmp_path / "plain" / "config.json").is_file()


@pytest.mark.slow
def test_the_example_of_a_trained_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_trained_model()
    names: dict[str, Any] = {}
    exec(next(block for block in blocks if "load_thinking" in block), names)
    assert names["output"].sequences.shape == (1, 16)
    printed = capsys.readouterr().out
    assert printed.startswith("2+6+4+3=") and "8 tokens in" in printed and "thought at" in printed
