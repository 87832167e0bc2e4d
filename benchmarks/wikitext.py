"""Quiet-STaR on natural text at CPU size: a small Mistral with the real Mistral-7B tokenizer on WikiText-2.

    python benchmarks/wikitext.py --data DIR      # with train.txt and valid.txt, WikiText-2 at word level

The model (4 layers of 128, 4.9 million parameters) is made from scratch and first reads the text as a plain language
model; then Quiet-STaR trains it on the same text. Both are runs of `quietstar.train`, whose command lines are printed.
The tokenizer comes from `mistral-common` (`pip install mistral-common`), which ships it. Writes wikitext.md and
wikitext.svg to `--results`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar import QuietStarForCausalLM
from quietstar.objective.learning import learn
from quietstar.reporting.charts import MOST_LINES, Plate, figure, keys_of, line_chart
from quietstar.reporting.scales import mean_curve
from quietstar.runs.checkpoints import latest_checkpoint
from quietstar.train import main as train
from quietstar.training.metrics import read_metrics


def make_model(directory: Path) -> None:
    """A fresh small Mistral and the tokenizer of Mistral-7B-v0.1."""
    import mistral_common

    directory.mkdir(parents=True, exist_ok=True)
    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(source, directory / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    MistralForCausalLM(config).save_pretrained(directory)


def run(arguments: dict[str, Any]) -> str:
    """One `quietstar.train`; returns its command line."""
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    command = "python -m quietstar.train " + " ".join(words)
    print(command, flush=True)
    if train(words):
        raise SystemExit(1)
    return command


def thoughts_table(checkpoint: Path, text: str, seed: int) -> list[str]:
    """Sampled thoughts at the most uncertain positions of a text, with the prediction without and with them."""
    model = QuietStarForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:64]])
    output = learn(model, ids, anchors="entropy:6", seed=seed, objective="default")
    lines = ["| text before | thought | next token | NLL without | with |", "|---|---|---|---|---|"]
    count = output.thoughts.thoughts_per_position
    for stream in range(0, output.thoughts.tokens.shape[1], count):
        anchor = int(output.thoughts.anchor[0, stream])
        before = tokenizer.decode(ids[0, max(0, anchor - 9) : anchor + 1])
        thought = tokenizer.decode(output.thoughts.tokens[0, stream])
        nlls = (output.base_nll_at_target[0, stream, 0], output.talk_nll[0, stream, 0])
        cells = [f"`{cell!r}`" for cell in (before, thought, tokenizer.decode(ids[0, anchor + 1 : anchor + 2]))]
        lines.append("| " + " | ".join(cells) + " | " + " | ".join(f"{float(value):.2f}" for value in nlls) + " |")
    return lines


def draw(metrics: list[dict[str, Any]], path: Path) -> None:
    """The evaluations' curves."""
    steps = [point["step"] for point in metrics]
    gains = [name for name in metrics[0] if re.fullmatch(r"gain(_\d+)?", name)]
    plates = []
    for title, names in (
        ("Held-out NLL (nats per token)", ["base_nll", "talk_nll"]),
        ("Gain of the thought (nats)", gains[:MOST_LINES]),
        ("Mixing weight", ["mixing_weight"]),
    ):
        series = [
            mean_curve(name, steps, [[point[name] for point in metrics]], colour=colour)
            for colour, name in enumerate(names, start=1)
        ]
        plates.append(Plate(title, line_chart(series, label=title, x_label="optimizer step"), keys_of(series)))
    path.write_text(figure("Quiet-STaR on WikiText-2 at CPU size", plates, columns=3), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt and valid.txt")
    parser.add_folders("runs/wikitext")
    parser.add_argument("--reading-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_threads(2)
    options = parser.begin(arguments)
    data = {"data.path": options.data / "train.txt", "data.validation_path": options.data / "valid.txt"}
    common = {**data, "training.threads": options.threads, "training.adam_beta2": 0.98, "training.weight_decay": 0.01}
    fresh, read = options.output / "fresh", options.output / "read"
    make_model(fresh)
    commands = [
        run(
            {
                "model.path": fresh,
                "output_dir": options.output / "reading",
                **common,
                "training.method": "language_modeling",
                "training.steps": options.reading_steps,
                "training.batch_size": 8,
                "data.length": 128,
                "training.learning_rate": 2e-3,
                "training.warmup_steps": 50,
                "training.eval_batches": 4,
            }
        )
    ]
    reading = latest_checkpoint(options.output / "reading" / "checkpoints")
    assert reading is not None
    QuietStarForCausalLM.from_pretrained(reading).base.save_pretrained(read)
    AutoTokenizer.from_pretrained(reading).save_pretrained(read)
    commands.append(
        run(
            {
                "model.path": read,
                "output_dir": options.output / "thinking",
                **common,
                "model.positions": "entropy:0.25",
                "training.steps": options.steps,
                "training.batch_size": 8,
                "data.length": 64,
                "training.learning_rate": 2e-4,
                "training.thought_embedding_lr_multiplier": 10,
                "training.eval_every": 25,
            }
        )
    )
    thinking = latest_checkpoint(options.output / "thinking" / "checkpoints")
    assert thinking is not None
    metrics = read_metrics(options.output / "thinking" / "metrics.jsonl", split="eval")
    options.results.mkdir(parents=True, exist_ok=True)
    draw(metrics, options.results / "wikitext.svg")
    names = [name for name in metrics[0] if name not in ("split", "seconds")]
    rows = [[f"{point[name]:.4g}" for name in names] for point in metrics]
    text = (options.data / "valid.txt").read_text(encoding="utf-8")[2000:3000]
    folder = str(options.data)
    body = "\n\n".join(
        [
            "Held-out text, thoughts at the quarter of the positions where the base is least sure:",
            markdown_table(names, rows),
            "Thoughts at the most uncertain positions of a held-out passage:",
            "\n".join(thoughts_table(thinking, text, seed=0)),
            "The two runs (DATA is the folder of the text):",
            "\n".join(f"    {command.replace(folder, 'DATA')}" for command in commands),
        ]
    )
    parser.write(options.results / "wikitext", "Quiet-STaR on WikiText-2 at CPU size", body)


if __name__ == "__main__":
    main()
