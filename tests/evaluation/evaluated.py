"""Small models over single characters with known predictions, and problems for them."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.evaluate import main
from quietstar.model.loading import character_tokenizer, small_llama

SYMBOLS = string.digits + string.ascii_letters + string.punctuation + " \n"
REST = 1e-9
"""Probability of every character that a hand-made distribution does not name."""


def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(SYMBOLS, "</s>")


def constant_model(probabilities: dict[str, float]) -> QuietStarForCausalLM:
    """A model that predicts the same hand-made distribution everywhere, with and without thoughts.

    The last layer norm of a GPT-2 gives nothing but its bias (1, 0, 0, ...), and the first column of the output head
    holds the log-probabilities.
    """
    own = tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(own),
        n_positions=512,
        n_embd=8,
        n_layer=1,
        n_head=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=own.eos_token_id,
    )
    base = GPT2LMHeadModel(config)
    with torch.no_grad():
        base.transformer.ln_f.weight.zero_()
        base.transformer.ln_f.bias.zero_()
        base.transformer.ln_f.bias[0] = 1.0
        base.lm_head.weight.zero_()
        base.lm_head.weight[:, 0] = math.log(REST)
        for character, probability in probabilities.items():
            base.lm_head.weight[SYMBOLS.index(character), 0] = math.log(probability)
    return QuietStarForCausalLM.from_base(base, own, thought_length=2, lookahead=2).eval()


def random_model(seed: int = 0) -> QuietStarForCausalLM:
    """A Llama whose thoughts change its predictions."""
    own = tokenizer()
    base = small_llama(
        seed, len(own), layers=1, hidden_size=32, intermediate_size=48, heads=2, context=512, end=own.eos_token_id
    )
    model = QuietStarForCausalLM.from_base(base, own, thought_length=2, lookahead=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (model.thought_embedding.weight, *model.mixing_head.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.base.get_output_embeddings().weight.mul_(20)  # predictions far from uniform
    return model.eval()


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_problems(directory: Path, golds: list[str]) -> Path:
    """GSM8K problems with these answers, and as many of CommonsenseQA with A, B, C, ..."""
    (directory / "gsm8k").mkdir(parents=True)
    (directory / "commonsenseqa").mkdir()
    numbers = [{"question": f"What is {n}?", "answer": f"So.\n#### {gold}"} for n, gold in enumerate(golds)]
    choices = [
        {
            "answerKey": "ABCDE"[n % 5],
            "id": f"c{n}",
            "question": {"stem": "Where?", "choices": [{"label": x, "text": f"{x}{n}"} for x in "ABCDE"]},
        }
        for n in range(len(golds))
    ]
    for path, rows in (("gsm8k/test.jsonl", numbers), ("commonsenseqa/dev_rand_split.jsonl", choices)):
        (directory / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def evaluate(checkpoint: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Runs the command; what `evaluation.json` holds."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main([str(checkpoint), "--output_dir", str(out), "--device", "cpu", *words]) == 0
    report: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return report


def result(report: dict[str, Any], metric: str, of: str) -> dict[str, Any]:
    (found,) = [row for row in report["results"] if (row["metric"], row["of"]) == (metric, of)]
    return dict(found)


def items(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluation_items.jsonl").read_text().splitlines()]
