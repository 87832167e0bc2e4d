"""`python -m quietstar.generate` prints what `model.generate` makes, and names what it cannot use."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.generate import main
from quietstar.model.loading import character_tokenizer
from tests.model.tiny import make_base, make_model

SYMBOLS = string.ascii_lowercase + string.digits + " .\n"
END = len(SYMBOLS)
BANNED = [SYMBOLS.index("y"), SYMBOLS.index("z")]
PROMPTS = ["the sum of 3 and 4", "a", "the sum of 3 and 4", "0123"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuietStarForCausalLM, PreTrainedTokenizerBase]:
    directory = tmp_path_factory.mktemp("thinking")
    model = make_model(changes={"eos_token_id": END}, thought_length=3, banned_token_ids=BANNED)
    tokenizer = character_tokenizer(SYMBOLS, "</s>")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, model, tokenizer


class Command:
    """Runs the command in this process."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self.capsys = directory, capsys
        self.errors = ""

    def __call__(self, *arguments: str, prompts: list[str] | None = None, status: int = 0) -> str:
        given = [word for prompt in prompts or [] for word in ("--prompt", prompt)]
        assert main([str(self.directory), *given, "--device", "cpu", "--max_new_tokens", "12", *arguments]) == status
        printed, self.errors = self.capsys.readouterr()
        return printed

    def json(self, *arguments: str, prompts: list[str] | None = None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self("--json", *arguments, prompts=prompts).splitlines()]


@pytest.fixture
def command(checkpoint: tuple[Path, Any, Any], capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(checkpoint[0], capsys)


@pytest.mark.parametrize("think", ["always", "every:3", "never"])
def test_completions_and_thoughts_are_those_of_generate(
    command: Command, checkpoint: tuple[Path, QuietStarForCausalLM, PreTrainedTokenizerBase], think: str
) -> None:
    _, model, tokenizer = checkpoint
    lines = command.json("--think", think, "--show_thoughts", prompts=PROMPTS)
    assert [line["prompt"] for line in lines] == PROMPTS
    for line in lines:
        ids = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": END}
        if think == "never":
            wanted = model.base.generate(ids, suppress_tokens=BANNED, **options)
        else:
            output = model.generate(ids, think=think, return_dict_in_generate=True, output_thoughts=True, **options)
            wanted = output.sequences
            for step, own in zip(output.thinking.thoughts, line["thoughts"], strict=True):
                assert (step is None) == (own is None)
                if step is not None:
                    assert own[0]["text"] == tokenizer.decode(step.tokens[0, 0])
                    assert own[0]["weight"] == pytest.approx(
                        float(step.mixing_weight), abs=1e-3
                    )  # its row was in a batch
        assert line["tokens"] == wanted[0, ids.shape[1] :].tolist()
        assert line["completion"] == tokenizer.decode(line["tokens"], skip_special_tokens=True)
        assert not set(line["tokens"]) & set(BANNED)
    tokens = sum(len(line["tokens"]) for line in lines)
    thought_at = sum(own is not None for line in lines for own in line["thoughts"])
    assert f"{tokens} tokens in" in command.errors and "seed" not in command.errors
    assert f"thought at {100 * thought_at / tokens:.0f} % of them" in command.errors


def test_samples_depend_on_the_seed_and_not_on_the_batches(command: Command) -> None:
    drawn = ("--temperature", "1.2", "--top_p", "0.9", "--samples", "2", "--thought_temperature", "1")
    first = command.json(*drawn, "--seed", "5", prompts=PROMPTS)
    assert command.json(*drawn, "--seed", "5", "--batch_size", "1", prompts=PROMPTS) == first
    of_equal_prompts = [line["completion"] for line in first if line["prompt"] == PROMPTS[0]]
    assert len(of_equal_prompts) == len(set(of_equal_prompts)) == 4
    other = command.json(*drawn, prompts=PROMPTS)
    assert other != first
    seed = command.errors.split("seed ")[1].strip()
    assert command.json(*drawn, "--seed", seed, prompts=PROMPTS) == other


def test_a_narrow_choice_is_the_greedy_one(command: Command) -> None:
    greedy = command.json(prompts=["abc"])
    assert command.json("--temperature", "3", "--top_k", "1", prompts=["abc"]) == greedy
    assert command.json("--temperature", "3", "--top_p", "0.001", prompts=["abc"]) == greedy


def test_a_stop_string_ends_each_row_by_itself(command: Command) -> None:
    """And counts no longer, though the others of its batch go on."""
    free = command.json(prompts=PROMPTS)
    stops = [free[0]["completion"][3:5], free[1]["completion"][6:8]]
    words = [word for stop in stops for word in ("--stop", stop)]
    lines = command.json(*words, "--think", "always", prompts=PROMPTS)
    assert f"{sum(len(line['tokens']) for line in lines)} tokens in" in command.errors
    assert "thought at 100 %" in command.errors
    for line, whole in zip(lines, free, strict=True):
        text = whole["completion"]
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        assert line["completion"] == text[: min(ends, default=len(text))]
        assert len(line["tokens"]) <= len(whole["tokens"])


def test_text_is_printed_plainly_and_as_it_comes(command: Command) -> None:
    text = command.json(prompts=["abc"])[0]["completion"]
    assert command(prompts=["abc"]).removesuffix("\n") == text.removesuffix("\n")
    assert command("--stream", prompts=["abc"]).removesuffix("\n") == text
    several = command("--samples", "2", "--temperature", "1", prompts=["abc", "0"])
    assert [line for line in several.splitlines() if line.startswith("---")] == [
        f"--- prompt {prompt}, sample {sample}" for prompt in (1, 2) for sample in (1, 2)
    ]


def test_shown_thoughts_stand_before_their_tokens(command: Command) -> None:
    line = command.json("--show_thoughts", "--think", "every:2", prompts=["abc"])[0]
    table = command("--show_thoughts", "--think", "every:2", prompts=["abc"])
    table = table[table.index("weight  token <- thought") :]
    rows = table.splitlines()[1:]
    assert len(rows) == len(line["tokens"]) == len(line["thoughts"])
    for row, token, own in zip(rows, line["tokens"], line["thoughts"], strict=True):
        shown = repr((SYMBOLS + " ")[token]) if token != END else "'</s>'"
        if own is None:
            assert row.split() == ["-", *shown.split()]
        else:
            assert row == f"{own[0]['weight']:6.3f}  {shown} <- {own[0]['text']!r}"


def test_files_of_prompts(command: Command, tmp_path: Path) -> None:
    wanted = command.json(prompts=PROMPTS)
    lines = tmp_path / "prompts.txt"
    lines.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(PROMPTS).encode())
    assert command.json("--prompts", str(lines)) == wanted
    objects = tmp_path / "prompts.jsonl"
    objects.write_text("".join(json.dumps({"id": 7, "prompt": prompt}) + "\n" for prompt in PROMPTS))
    assert command.json("--prompts", str(objects)) == wanted


def test_a_tokenizer_that_drops_the_first_space_and_has_a_beginning(command: Command, tmp_path: Path) -> None:
    """As SentencePiece: the new tokens alone would be decoded without the space before the first."""
    words = {"<s>": 0, **{f"▁w{index}": index for index in range(1, END + 1)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    found = command.json("--tokenizer", str(tmp_path), prompts=["w3 w4", ""])
    for line in found:
        wanted = [f"w{token}" for token in line["tokens"] if token]
        assert line["completion"].split() == wanted and len(wanted) > 1
    assert found[0]["completion"].startswith(" w")


BAD_ARGUMENTS = {
    "prompt: missing; needs either --prompt": [],
    "prompt: got it together with prompts": ["--prompt", "a", "--prompts", "b.txt"],
    "prompts: cannot read prompts.csv (No such file": ["--prompts", "prompts.csv"],
    "prompts: cannot read nowhere.txt": ["--prompts", "nowhere.txt"],
    "think: got 'sometimes'": ["--prompt", "a", "--think", "sometimes"],
    "think: got 'learned', but this model has no learned gate": ["--prompt", "a", "--think", "learned"],
    "max_new_tokens: got 0": ["--prompt", "a", "--max_new_tokens", "0"],
    "batch_size: got 0": ["--prompt", "a", "--batch_size", "0"],
    "temperature: got -1.0": ["--prompt", "a", "--temperature", "-1"],
    "thought_temperature: got 'nan', needs a number": ["--prompt", "a", "--thought_temperature", "nan"],
    "thought_temperature: got nan, needs a finite number": ["--prompt", "a", "--thought_temperature", ".nan"],
    "thought_temperature: got 0 with 2 thoughts": [
        *("--prompt", "a", "--thoughts_per_token", "2", "--thought_temperature", "0")
    ],
    "top_p: got 1.5": ["--prompt", "a", "--top_p", "1.5", "--temperature", "1"],
    "top_k: got 5 at temperature 0": ["--prompt", "a", "--top_k", "5"],
    "samples: got 2 at temperature 0": ["--prompt", "a", "--samples", "2"],
    "stop: got an empty text": ["--prompt", "a", "--stop", ""],
    "stream: got it with 2 completions": ["--prompt", "a", "--prompt", "b", "--stream"],
    "stream: got it with --json": ["--prompt", "a", "--stream", "--json"],
    "device: got 'tpu'": ["--prompt", "a", "--device", "tpu"],
    "prompt: is empty, and the tokenizer has no beginning-of-sequence token": ["--prompt", ""],
    "prompt 2: the tokenizer cannot encode 'É'": ["--prompt", "a", "--prompt", "É"],
    "prompt 2: contains 'y', token 24, which is kept for thoughts": ["--prompt", "a", "--prompt", "by"],
    "prompt: has 50 tokens; with max_new_tokens 12 and 4 positions for thoughts that is more than the 64 of the "
    "base's context; lower max_new_tokens to at most 10": ["--prompt", "a" * 50],
    "base's context; shorten it": ["--prompt", "a" * 64],
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*BAD_ARGUMENTS[message], status=2) == ""
    assert message in command.errors and command.errors.splitlines()[-1].startswith("error: ")


BAD_FILES = {
    "prompts.txt:2: not UTF-8 text": b"a\n\xff\xfe\n",
    "prompts.txt:2: is empty, and the tokenizer": b"a\n\nb\n",
    "prompts.txt:3: contains 'z'": b"a\nb\nz\n",
    "prompts.txt: is empty, needs at least one prompt": b"",
    "prompts.jsonl:2: not valid JSON": b'{"prompt": "a"}\n{"prompt": "a"\n',
    "prompts.jsonl:1: holds a JSON array": b"[1]\n",
    "prompts.jsonl:1: has no field 'prompt' (its fields: 'text'); field names the one to read": b'{"text": "a"}\n',
    "prompts.jsonl:1: field 'prompt' is a JSON number, needs a string": b'{"prompt": 3}\n',
    "prompts.jsonl:2: prompt.0.role is a JSON number": (
        b'{"prompt": "a"}\n{"prompt": [{"role": 3, "content": "a"}]}\n'
    ),
    "prompts.csv: it is a parquet file; needs UTF-8 text": b"PAR1",
    "prompts.txt: holds JSON objects": b'{"prompt": "a"}\n{"prompt": "b"}\n',
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = message.split(":")[0]
    Path(name).write_bytes(BAD_FILES[message])
    command("--prompts", name, status=2)
    assert message in command.errors


def test_a_plain_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_base().save_pretrained(tmp_path)
    assert main([str(tmp_path), "--prompt", "a"]) == 2
    message = capsys.readouterr().err
    assert "a plain mistral model" in message and "AutoModelForCausalLM" in message
