"""How much of a thought's gain the learned gate keeps, at what share of the thoughts.

    python -m quietstar.train --textbook.controls false --training.seed 0 --output_dir runs/0    # and 1, 2
    python benchmarks/gate.py --case textbook runs/0/seed-0/quietstar runs/0/seed-0/held_out.txt 40 ...

Every case is a name, a checkpoint, a text of the kind to come, and tokens per text; those of one name are put together.
`--about` says in the result what a name stands for.
Each gate is fitted with several splits into fitted and held-out texts. With `--sums` and a checkpoint of the textbook,
`generate` writes sums with it, thinking in several ways. Writes gate.md and gate.csv to `--results`.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar.data.packing import pack
from quietstar.data.sources import read_documents
from quietstar.demos.corpus import MODULUS
from quietstar.inference.gate import fit_gate
from quietstar.inference.gate_choices import SHARES, THRESHOLDS, Choice, GateReport
from quietstar.inference.loading import load_thinking
from quietstar.model.modeling import QuietStarForCausalLM

WAYS = ("never", "always", "learned>0", "learned>0.1", "entropy>1", "entropy>1.97")
PROMPTS, FEW, NEW = 64, 8, 40
COLUMNS = ("think", "tokens thought at", "NLL", "gain kept", "entropy, as many", "random", "best possible")
SMALL = 0.01
"""Nats per token; shares of a smaller gain would say little, and the table has the gains themselves."""
GAINS = ("gain", "entropy_gain", "random_gain", "best_gain")
NOTE = """
Gain kept is the share of what a thought at every token gains; where that is less than 0.01 nats per token, the columns
are nats per token. `entropy` thinks at as many tokens, those whose prediction without thought is least sure; `random`
at as many drawn at random; `best possible` at those that gain most, which only their next token tells. All of it is of
held-out texts, which no gate was fitted to; a number behind +- is the standard deviation over the fits. The thresholds
at a share are such for the fitted texts. What `generate(think="learned")` means is chosen by cross-validation on the
fitted texts, and is never unless the 95% bootstrap interval of its gain, over the held-out texts, lies above 0.001
nats a token.
"""
BATCHES = """
A token is drawn for all rows of a batch at once, which wait where any of them thinks. Where `learned>0` thinks is
scattered, so that of 64 rows one nearly always does: the thoughts are made anyway, and before them the choice takes a
pass of the text that `always` does without, so that it is about as slow as `always`, or slower. Choosing saves time
where few tokens are thought at, where the rows think at the same places (these lines have one length, so that operands
and answers stand in step), or in a small batch: one prompt at a time, each token without a thought is fast.
"""
"""What the generation tables show."""


def fits(cases: Sequence[Sequence[str]], splits: int, max_tokens: int) -> dict[str, list[GateReport]]:
    """Reports of each name, one for each of its checkpoints and splits."""
    found: dict[str, list[GateReport]] = {}
    for name, checkpoint, text, length in cases:
        for seed in range(splits):
            model, tokenizer = load_thinking(checkpoint, device="cpu")
            texts = pack(
                read_documents(text), tokenizer, int(length), tokenizer.eos_token_id is not None, separate=True
            )
            texts = texts.part(slice(max_tokens // int(length)))
            report = fit_gate(model, texts.tokens, texts.attention_mask, seed=seed)
            print(f"{name}, {checkpoint}, split {seed}: {report}\n", flush=True)
            found.setdefault(name, []).append(report)
    return found


def rows_of(report: GateReport) -> dict[str, Choice]:
    """Its choices, the ones at a share by the share: their thresholds differ from fit to fit."""
    fixed = {f"learned>{threshold:g}" for threshold in THRESHOLDS} | {"always", "never"}
    shares = iter(SHARES)
    return {
        choice.think if choice.think in fixed else f"learned, about {next(shares):.0%}": choice
        for choice in report.choices
    }


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    middle = format(statistics.mean(values), form)
    return middle if len(values) == 1 else f"{middle} +- {format(statistics.stdev(values), form.removeprefix('+'))}"


def table(reports: Sequence[GateReport]) -> str:
    """One row for each way to think."""
    rows, together = [], [rows_of(report) for report in reports]
    as_shares = min(report.mean_gain for report in reports) > SMALL
    for think in together[0]:
        choices = [rows[think] for rows in together]
        gains = [[getattr(one, name) for one in choices] for name in GAINS]
        wholes = [report.mean_gain for report in reports]
        kept = [
            spread([one / whole for one, whole in zip(of_one, wholes, strict=True)], ".1%")
            if as_shares
            else spread(of_one, "+.4f")
            for of_one in gains
        ]
        shares, nlls = [choice.share for choice in choices], [choice.nll for choice in choices]
        rows.append([think, spread(shares, ".1%"), spread(nlls, ".4f"), *kept])
    return markdown_table(COLUMNS, rows)


def summary(name: str, reports: Sequence[GateReport]) -> str:
    """What the table is of."""
    fitted = statistics.mean(report.fitted_tokens for report in reports)
    tokens = statistics.mean(report.tokens for report in reports)
    ridges = ", ".join(f"{ridge:g}" for ridge in sorted({report.ridge for report in reports}))
    return (
        f"## {name}\n\n{len(reports)} fits to {fitted:.0f} tokens each, judged on {tokens:.0f}. A thought at every "
        f"token gains {spread([report.mean_gain for report in reports], '.4f')} nats per token; R^2 of the gate "
        f"{spread([report.r_squared for report in reports], '.3f')}; ridge {ridges}. {advice(reports)}"
    )


def advice(reports: Sequence[GateReport]) -> str:
    """What `learned` means after each fit."""
    thinking = [report.advised for report in reports if report.advised.think != "never"]
    found = f'`think="learned"` means never in {len(reports) - len(thinking)} of {len(reports)} fits'
    if not thinking:
        chosen = [report.choices for report in reports if report.chosen != "never"]
        return f"{found}; in {len(chosen)} of them a choice gained on the fitted texts, not surely on the others."
    gains, lows = [choice.gain for choice in thinking], [choice.low for choice in thinking if choice.low is not None]
    return (
        f"{found}; in the others it thinks at {spread([choice.share for choice in thinking], '.1%')} of the tokens and "
        f"gains {spread(gains, '.4f')} nats, the lower ends of the intervals from {min(lows):.4f}."
    )


def write_sums(checkpoint: str, text: str, length: int) -> str:
    """Sums that `generate` draws: how many are right, how many tokens it thought at, and how fast it was."""
    model, tokenizer = load_thinking(checkpoint, device="cpu")
    lines = Path(text).read_text(encoding="utf-8").splitlines()[:PROMPTS]
    texts = pack(read_documents(text), tokenizer, length, tokenizer.eos_token_id is not None, separate=True)
    fit_gate(model, texts.tokens, texts.attention_mask)
    prompts = torch.tensor([tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"] for line in lines])
    together = speeds(model, tokenizer, prompts, PROMPTS, repeats=5)
    alone = speeds(model, tokenizer, prompts[:FEW], 1, repeats=3)
    return (
        f"## Sums that `generate` writes\n\n{PROMPTS} prompts of one sum, {NEW} drawn tokens each; chance is 14.3%. "
        f"Median time of 5.\n{BATCHES}\n{together}\n\nThe first {FEW} prompts, one at a time, median time of 3:"
        f"\n\n{alone}"
    )


def speeds(
    model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: torch.Tensor, batch: int, repeats: int
) -> str:
    """One row for each way to think, of prompts [n, length] of which `batch` are continued at once."""
    settings = {"max_new_tokens": NEW, "do_sample": True, "seed": 0, "return_dict_in_generate": True}
    steps = {think: thinking_steps(model, prompts, batch, think, settings) for think in WAYS}
    seconds: dict[str, list[float]] = {think: [] for think in WAYS}
    rows: dict[str, list[str]] = {}
    for _ in range(repeats):  # the ways in turn, so that what else the machine does falls on all of them
        for think in WAYS:
            begin = time.perf_counter()
            made = write(model, prompts, batch, think, settings)
            seconds[think].append(time.perf_counter() - begin)
            written = [
                tokenizer.decode(row).replace(" ", "").split("\n")[1:-1] for part in made for row in part.sequences
            ]
            sums = [re.fullmatch(r"([0-6](?:\+[0-6])+)=([0-6])", line) for lines in written for line in lines]
            right = [sum(map(int, one[1].split("+"))) % MODULUS == int(one[2]) for one in sums if one]
            share = statistics.mean(0.0 if part.thinking is None else part.thinking.share for part in made)
            rows[think] = [
                f"{share:.1%}",
                f"{steps[think]:.1%}",
                f"{sum(right) / max(1, len(right)):.1%}",
                f"{len(right)} of {len(sums)}",
            ]
    rates = {think: len(prompts) * NEW / statistics.median(seconds[think]) for think in WAYS}
    cells = [[think, *rows[think], f"{rates[think]:,.0f}", f"{rates[think] / rates['never']:.2f}"] for think in WAYS]
    columns = (
        "think",
        "tokens thought at",
        "steps with a thought",
        "sums right",
        "lines that are sums",
        "tokens/s",
        "of the base's",
    )
    return markdown_table(columns, cells)


def write(
    model: QuietStarForCausalLM, prompts: torch.Tensor, batch: int, think: str, settings: dict[str, Any]
) -> list[Any]:
    """What `generate` returns for each batch."""
    parts = prompts.split(batch)
    return [model.generate(part, attention_mask=torch.ones_like(part), think=think, **settings) for part in parts]


def thinking_steps(
    model: QuietStarForCausalLM, prompts: torch.Tensor, batch: int, think: str, settings: dict[str, Any]
) -> float:
    """Share of the steps, each a token of all rows of a batch, at which any row thinks."""
    made = write(model, prompts, batch, think, {**settings, "output_thoughts": think != "never"})
    thought = [one is not None for part in made if part.thinking is not None for one in part.thinking.thoughts]
    return statistics.mean(thought) if thought else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument(
        "--case", nargs=4, action="append", required=True, metavar=("NAME", "CHECKPOINT", "TEXT", "LENGTH")
    )
    parser.add_argument("--about", nargs=2, action="append", default=[], metavar=("NAME", "TEXT"))
    parser.add_argument("--sums", nargs=3, metavar=("CHECKPOINT", "TEXT", "LENGTH"))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=40_000)
    parser.add_results()
    options = parser.begin(arguments, threads=1)
    found = fits(options.case, options.splits, options.max_tokens)
    about = dict(options.about)
    parts = [
        "\n\n".join([summary(name, reports), *([about[name]] if name in about else []), table(reports)])
        for name, reports in found.items()
    ]
    if options.sums:
        checkpoint, text, length = options.sums
        parts.append(write_sums(checkpoint, text, int(length)))
    rows = [
        {"case": name, "fit": number, "r_squared": report.r_squared, "mean_gain": report.mean_gain}
        | {"is_advised": choice is report.advised, **vars(choice)}
        for name, reports in found.items()
        for number, report in enumerate(reports)
        for choice in report.choices
    ]
    parser.write(options.results / "gate", "The thinking gate", "\n\n".join([NOTE.strip(), *parts]), rows)


if __name__ == "__main__":
    main()
