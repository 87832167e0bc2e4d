"""What the pages call the reader's own: tiny models, texts, problems and candidates."""

from __future__ import annotations

import json
import string
from pathlib import Path

from quietstar.demos.textbook import character_model, character_tokenizer
from quietstar.model.loading import character_tokenizer as letters
from quietstar.model.loading import small_llama
from quietstar.model.modeling import QuietStarForCausalLM

MODEL, LETTERS = "model", "letters"
"""Directories of the two models: of the textbook's characters, and of all that can be printed."""
TRAINED, VERIFIER = "runs/textbook/seed-0/quietstar", "runs/vstar/verifiers/dpo/model"
"""Where the embedded defaults leave a thinking model and a verifier."""
LINES = ["2+6+4+3=1", "0+0+0+1=1", "1+2+3+4=3"] * 40


def write_model(directory: str | Path) -> None:
    """A model that reads sums."""
    character_model(0).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)


def write_letters(directory: str | Path) -> None:
    """A model that can read letters."""
    tokenizer = letters(string.printable, "</s>")
    tokenizer.save_pretrained(directory)
    small_llama(0, len(tokenizer), layers=1, hidden_size=16, end=tokenizer.eos_token_id).save_pretrained(directory)


def write_texts() -> None:
    """Texts to train on."""
    Path("my-text.txt").write_text("\n".join(LINES))
    Path("my-text.jsonl").write_text("".join(json.dumps({"body": line * 9}) + "\n" for line in LINES))


def write_loop_inputs() -> None:
    """A model that can read letters, and problems and candidates."""
    write_letters(LETTERS)
    problem = {"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7.\n#### 7", "solution": "3 + 4 = 7.\n#### 7"}
    Path("my-problems").mkdir()
    for split in ("train", "test"):
        Path(f"my-problems/{split}.jsonl").write_text(json.dumps(problem) + "\n")
    candidates = {"prompt": "What is 3 + 4?", "completions": ["7", "8"]}
    Path("my-candidates.jsonl").write_text(json.dumps(candidates) + "\n")


def write_trained_model() -> None:
    """A thinking model where the first command leaves one, and its held-out text."""
    base, tokenizer = character_model(0), character_tokenizer()
    QuietStarForCausalLM.from_base(base, tokenizer, start_text="[", end_text="]", thought_length=2).save_pretrained(
        TRAINED
    )
    tokenizer.save_pretrained(TRAINED)
    (Path(TRAINED).parent / "held_out.txt").write_text("\n".join(LINES))
