"""The evaluation command on the real held-out problems of GSM8K and CommonsenseQA, with a small model.

    QUIETSTAR_DATA=DATA python benchmarks/evaluation.py

A model of a few million parameters reads the training problems in the format of the evaluation, and some of WikiText-2,
as a plain language model; then Quiet-STaR trains it on the same text; then `quietstar.evaluate` measures it on problems
and text that it has not read. A model of this size does not reason: its numbers show that the measures run and what
they look like, and say nothing about the method. DATA holds the folders gsm8k, commonsenseqa and wikitext2.
Writes evaluation.md to `--results`; what is finished is kept in `--output`, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, only this file's own folder is on the path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.environment import describe, markdown_table, write_markdown
from quietstar import QuietStarForCausalLM
from quietstar.evaluate import main as evaluate
from quietstar.evaluation.answers import STEP_BY_STEP, AnswerFormat, load_format
from quietstar.model.loading import small_llama
from quietstar.reporting.evaluation_page import HEAD, direction, group_table, results_table
from quietstar.runs.checkpoints import latest_checkpoint
from quietstar.train import main as train

VOCABULARY = 4096
TEXT_BYTES = 1_500_000


def documents(data: Path) -> list[str]:
    """Training problems with their answers, GSM8K's also after their solutions, and paragraphs of WikiText-2."""
    found = []
    for name in ("gsm8k", "commonsenseqa"):
        form = load_format(name, data)
        for problem in form.task.problems("train"):
            found.append(f"{form.prompt(problem)} {form.answer(problem)}\n")
            if problem.rationale is not None:
                found.append(
                    f"{form.prompt(problem)}{STEP_BY_STEP}{reasoning(form, problem.rationale, problem.answer)}"
                )
    text = (data / "wikitext2" / "train.txt").read_text(encoding="utf-8")[:TEXT_BYTES]
    found += [paragraph for paragraph in text.split("\n") if len(paragraph) > 100]
    random.Random(0).shuffle(found)
    return found


def reasoning(form: AnswerFormat, rationale: str, answer: str) -> str:
    """A solution and its answer as the chain of thought's second stage asks for it."""
    return f" {rationale.partition('####')[0].strip()}{form.conclusion} {answer}\n"


def make_model(directory: Path, texts: list[str]) -> None:
    """A fresh Llama and a tokenizer of the training text, with a token for each digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    model = small_llama(
        0, len(wrapped), layers=4, hidden_size=192, intermediate_size=512, context=1024, end=wrapped.eos_token_id
    )
    wrapped.save_pretrained(directory)
    model.save_pretrained(directory)


def run(command: Any, name: str, arguments: dict[str, Any], positional: list[str] | None = None) -> str:
    """One command; returns its line."""
    words = [*(positional or []), *(word for key, value in arguments.items() for word in (f"--{key}", str(value)))]
    line = f"python -m quietstar.{name} {' '.join(words)}"
    print(line, flush=True)
    start = time.perf_counter()
    if command(words):
        raise SystemExit(1)
    print(f"took {time.perf_counter() - start:.0f} s", flush=True)
    return line


def make_thinking(out: Path, data: Path, options: argparse.Namespace) -> tuple[Path, list[str]]:
    """The trained model, and the commands that trained it."""
    fresh, read, corpus = out / "fresh", out / "read", out / "train.jsonl"
    if not fresh.is_dir():
        texts = documents(data)
        out.mkdir(parents=True, exist_ok=True)
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        make_model(fresh, texts)
    common = {
        "data.path": corpus,
        "data.validation_fraction": 0.01,
        "training.threads": options.threads,
        "training.adam_beta2": 0.98,
        "training.weight_decay": 0.01,
        "training.device": options.device,
    }
    commands = [
        run(
            train,
            "train",
            {
                "model.path": fresh,
                "output_dir": out / "reading",
                **common,
                "training.method": "language_modeling",
                "training.steps": options.reading_steps,
                "training.batch_size": 8,
                "data.length": 192,
                "training.learning_rate": 2e-3,
                "training.warmup_steps": 50,
                "training.eval_batches": 4,
            },
        )
    ]
    reading = latest_checkpoint(out / "reading" / "checkpoints")
    assert reading is not None
    if not read.is_dir():
        QuietStarForCausalLM.from_pretrained(reading).base.save_pretrained(out / "read.new")
        AutoTokenizer.from_pretrained(reading).save_pretrained(out / "read.new")
        shutil.move(out / "read.new", read)
    commands.append(
        run(
            train,
            "train",
            {
                "model.path": read,
                "output_dir": out / "thinking",
                **common,
                "model.positions": "entropy:0.25",
                "training.steps": options.steps,
                "training.batch_size": 8,
                "data.length": 96,
                "training.learning_rate": 2e-4,
                "training.thought_embedding_lr_multiplier": 10,
                "training.eval_every": 50,
            },
        )
    )
    return out / "thinking", commands


def parameters(run: Path) -> float:
    """Millions of them in the model that a run has trained."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return sum(one.numel() for one in QuietStarForCausalLM.from_pretrained(checkpoint).parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--data", type=Path, default=os.environ.get("QUIETSTAR_DATA"), help="default: QUIETSTAR_DATA")
    parser.add_argument("--reading-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--problems", type=int, help="of each task; default: all held-out problems")
    parser.add_argument("--cot-problems", type=int, default=128, help="of GSM8K, as in the paper")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data: missing, and QUIETSTAR_DATA is not set; needs a folder with gsm8k/")
    transformers.utils.logging.disable_progress_bar()
    facts = describe("benchmarks/evaluation.py", sys.argv[1:], threads=options.threads, device=options.device)
    model, commands = make_thinking(options.output, options.data, options)
    torch.set_num_threads(options.threads)
    common = {"data": options.data, "batch_size": 32, "device": options.device}
    everything = options.output / "everything"
    begun = everything.is_dir()
    asked: dict[str, Any] = {"tasks": "gsm8k,commonsenseqa", "metrics": "soft,exact", "max_new_tokens": 32, **common}
    if options.problems is not None:
        asked["problems"] = options.problems
    asked |= {"text": options.data / "wikitext2" / "test.txt", "output_dir": everything}
    commands.append(run(evaluate, "evaluate", asked, [str(model)]))
    chains = options.output / "chains"
    asked = {"tasks": "gsm8k", "metrics": "cot", "max_new_tokens": 96, "problems": options.cot_problems, **common}
    commands.append(run(evaluate, "evaluate", asked | {"output_dir": chains}, [str(model)]))
    found = [json.loads((out / "evaluation.json").read_text(encoding="utf-8")) for out in (everything, chains)]
    results = [row for one in found for row in one["results"]]
    parts = [
        f"A model of {parameters(model):.1f} million parameters that has read the training problems in this format and "
        "some of WikiText-2 for some minutes; what it gets right shows the measures at work and says nothing of the "
        "method. It was trained to think at the quarter of the positions where it is least sure, and is asked to think "
        "at all of them. 95 % bootstrap intervals; the difference is paired, on the same items.",
        markdown_table(HEAD, results_table(results), text_columns=2),
    ]
    for row in results:
        for kind, groups in row["groups"].items():
            head = [f"{row['metric']} by {kind} ({row['unit']})", *HEAD[2:]]
            parts.append(markdown_table(head, group_table(groups, row["unit"], direction(row, kind))))
            if kind in row["caveats"]:
                parts.append(row["caveats"][kind])
    parts.append("\n".join(dict.fromkeys(f"- {row['metric']}: {row['statement']}" for row in results)))
    if begun:
        parts.append("Items that an interrupted run of this script had measured were not measured again.")
    parts.append("The commands (DATA is the folder of the data, OUTPUT that of the runs):")
    shown = [line.replace(str(options.data), "DATA").replace(str(options.output), "OUTPUT") for line in commands]
    parts.append("\n".join(f"    {line}" for line in shown))
    body = "\n\n".join(parts)
    write_markdown(
        options.results / "evaluation.md", "The evaluation on real problems, with a small model", facts, body
    )
    print(body)


if __name__ == "__main__":
    main()
