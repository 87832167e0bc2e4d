"""Does a given model think on given texts? Quiet-STaR with its controls, in a number of minutes.

    python benchmarks/real_model.py --model DIR --texts gsm8k.jsonl:question+answer book.txt --minutes 60 --device cpu

A text is a window of `--length` tokens. Of the end of each file up to a fifth is held out, and the positions that are
measured there are chosen once, by the given model. Every row has the same targets: without thought, with their own
thoughts, and with the thoughts of another text of the same file, which are the same thoughts in another order. Thinking
is what a text's own thoughts gain over foreign ones.

A third of the minutes is for measuring, the rest for training. Of this, plain language modelling on the same texts gets
1 part, so that adaptation does not count; from its weights Quiet-STaR gets 3 parts, and each control too. As long as
Quiet-STaR would get fewer than 20 steps, the last control is left out. One step of each kind is timed at the beginning,
and what fits is written down: a run that was killed goes on with the same command and comes to the same rows.

It needs torch and transformers, on a GPU also Triton, and no network; of this project nothing but a checkout, with
`PYTHONPATH=kernels` where it is not installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from torch import Tensor

from benchmarks.environment import markdown_table
from benchmarks.script import Benchmark
from quietstar.config.objective import OBJECTIVE_PRESETS, ObjectiveOptions
from quietstar.config.options import Count, Natural, Positive, check_model_path, check_number
from quietstar.config.parsing import read_json_file
from quietstar.config.training import DataOptions, ModelOptions, TrainConfig, TrainingOptions, validate
from quietstar.data.batches import Batch, IndexedBatches
from quietstar.data.packing import pack
from quietstar.data.rows import OptionNames
from quietstar.data.sources import Document, read_documents
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import ConfigError, DataError, run_command
from quietstar.evaluation.item_store import ItemStore
from quietstar.model.loading import load_causal_lm
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.padding import read_padding
from quietstar.objective.learning import learn, lookahead_targets
from quietstar.runs.checkpoints import latest_checkpoint
from quietstar.runs.files import RunLock, changed_options, make_output_dir, write_json
from quietstar.runs.machine import resolve_device, set_up
from quietstar.statistics.intervals import Estimate, estimate
from quietstar.training.step_functions import EVALUATION_SEED, compute_step, token_nll
from quietstar.training.trainer import Trainer

LEAST_STEPS, SHORT_STEPS, LEAST_TEXTS = 20, 200, 20
"""Steps of Quiet-STaR that matter more than a control; steps of less than a short run; texts that a verdict needs."""
ENOUGH_SECONDS = 5
"""Time of a first step on a CPU from which on it counts itself."""
LATE = 1.1
"""Share of the minutes beyond which no control begins."""
NAMES = OptionNames("--texts", "the FIELD of --texts", length="--length", tokenizer="--model")
STATE = {"identity", "spent", "trained", "seconds", "steps", "texts", "left out", "positions"}
COLUMNS = ("steps", "targets", "no thought", "own thoughts", "foreign thoughts", "gain", "own - foreign", "verdict")


@dataclass(frozen=True)
class Run:
    """One row; `parts` is its share of the training, `measured` what it is measured with."""

    name: str
    parts: int
    method: Literal["quietstar", "language_modeling"] = "quietstar"
    measured: Literal["no thoughts", "thoughts", "thoughts of one content"] = "thoughts"
    policy_weight: float | None = None


GIVEN = Run("as given", 0, measured="no thoughts")
FIRST = Run("language modelling first", 1, "language_modeling")
THINKING = Run("Quiet-STaR", 3)
PLAIN = Run("control: language modelling", 3, "language_modeling", "no thoughts")
UNREWARDED = Run("control: no REINFORCE", 3, policy_weight=0.0)
PAUSE = Run("control: pause tokens", 3, measured="thoughts of one content")
CONTROLS = (PLAIN, UNREWARDED, PAUSE)
RUNS = (GIVEN, FIRST, THINKING, *CONTROLS)


def read_texts(sources: Sequence[str], tokenizer: Any, length: int, most: int) -> tuple[Tensor, list[Tensor]]:
    """Returns the texts to train on, int64 [n, L], and those of each file that can be measured.

    Raises:
        DataError: A file cannot be read, or has too few texts.
    """
    train, held_out = [], []
    for source in sources:
        texts = pack(documents(source), tokenizer, length, names=NAMES).tokens
        count = min(len(texts) // 5, max(2, most // len(sources)))
        if count < 2:
            needs = "needs 10: a fifth is held out, and 2 have to exchange their thoughts"
            raise DataError(f"--texts {source}: {len(texts)} texts of {length} tokens; {needs}")
        train.append(texts[:-count])
        held_out.append(texts[-count:])
    return torch.cat(train), held_out


def documents(source: str) -> Iterator[Document]:
    """The documents of `FILE`, or of `FILE:FIELD+FIELD`, whose fields are joined by a line break."""
    path, fields = source, "text"
    if ":" in source and not Path(source).exists():
        path, _, fields = source.rpartition(":")
    for rows in zip(*(read_documents(path, field, names=NAMES) for field in fields.split("+")), strict=True):
        yield replace(rows[0], text="\n".join(row.text for row in rows))


def partners(counts: Sequence[int]) -> list[int]:
    """For each text the one whose thoughts it gets: half of the texts of its file further on.

    Args:
        counts: Measured texts of each file, at least 2.
    """
    found: list[int] = []
    for count in counts:
        first = len(found)
        found += [first + (place + count // 2) % count for place in range(count)]
    return found


@torch.no_grad()
def measure(
    model: QuietStarForCausalLM,
    texts: Tensor,
    positions: Tensor,
    partner: Sequence[int],
    at_once: int,
    thinks: bool = True,
    known: Callable[[int], bool] = lambda text: False,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Mean NLL of the targets of each text: without thought, with its own thoughts, with those of its partner.

    Args:
        model: Measured on its device.
        texts: int64 [n, L].
        positions: Where it thinks, int32 [n, A].
        partner: For each text the one whose thoughts are foreign to it.
        at_once: Texts of a forward pass.
        thinks: Whether it has thoughts.
        known: Whether a text is measured already.
    """
    model.train(False)
    parts = [slice(first, min(first + at_once, len(texts))) for first in range(0, len(texts), at_once)]
    thoughts = [
        model.think(texts[part], anchors=positions[part], seed=EVALUATION_SEED, first_text=part.start)
        for part in (parts if thinks else [])
    ]
    policy_free = replace(OBJECTIVE_PRESETS["default"], policy_weight=0.0)
    for index, part in enumerate(parts):
        if all(map(known, range(part.start, part.stop))):
            continue
        if thinks:
            tokens = torch.cat([own.tokens for own in thoughts])[list(partner[part])]
            own, foreign = (
                learn(model, texts[part], thoughts=those, objective=policy_free, reuse_sampling_pass=False)
                for those in (thoughts[index], replace(thoughts[index], tokens=tokens))
            )
            mask, found = own.target_mask, {"without": own.base_nll_at_target, "own": own.talk_nll}
            found |= {"foreign": foreign.talk_nll, "mixing weight": own.mixing_weight}
        else:
            source, mask = lookahead_targets(read_padding(texts[part], None), positions[part], model.config.lookahead)
            nll = token_nll(model, Batch(texts[part], None, ()))
            found = {"without": nll.gather(1, source.flatten(1)).view(source.shape)}
        count = mask.sum((1, 2))
        targets = (count // (mask.shape[1] // positions.shape[1])).tolist()  # a position's thoughts share them
        means = {name: (value.double() * mask).sum((1, 2)).div(count).tolist() for name, value in found.items()}
        for row, text in enumerate(range(part.start, part.stop)):
            if not known(text):
                yield text, {"targets": targets[row], **{name: values[row] for name, values in means.items()}}


def divide(seconds: Mapping[str, float], minutes: float, least: int, most: int) -> dict[str, Any]:
    """What fits into the minutes: steps of each run, texts to measure, and what is left out, with the reason.

    Args:
        seconds: Of a step of each method, and of measuring a `text`.
        minutes: For everything.
        least: Texts to measure, at least.
        most: Texts that there are.
    """
    for kept in range(len(CONTROLS), -1, -1):
        runs = [FIRST, THINKING, *CONTROLS[:kept]]
        part = 40 * minutes / sum(run.parts for run in runs)
        steps = {run.name: max(1, int(part * run.parts / seconds[run.method])) for run in runs}
        if steps[THINKING.name] >= LEAST_STEPS:
            break
    texts = int(20 * minutes / seconds["text"] / sum(run.measured != "no thoughts" for run in runs))
    reason = f"with it Quiet-STaR would have fewer than {LEAST_STEPS} steps"
    left_out = {run.name: reason for run in CONTROLS[kept:]}
    return {"steps": {GIVEN.name: 0, **steps}, "texts": min(most, max(least, texts)), "left out": left_out}


def verdict(gain: Estimate, texts: int) -> str:
    """What the interval of own - foreign allows to say."""
    if texts < LEAST_TEXTS or gain.low is None or gain.high is None:
        return f"too little to tell: {texts} texts, needs {LEAST_TEXTS}"
    if gain.low <= 0 <= gain.high:
        return "no difference can be told"
    return f"own thoughts {'better' if gain.low > 0 else 'worse'} than foreign ones"


def shown(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:+.4f}" + ("" if value.low is None else f" [{value.low:+.4f}, {value.high:+.4f}]")


def row_of(run: Run, records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the records of the texts come to."""

    def mean(name: str, there: bool = True) -> str:
        return f"{sum(record[name] for record in records) / len(records):.4f}" if there else "-"

    thinks, differ = run.measured != "no thoughts", run.measured == "thoughts"
    gain = estimate([record["foreign"] - record["own"] for record in records]) if differ else None
    return {
        "texts": len(records),
        "targets": sum(int(record["targets"]) for record in records),
        "no thought": mean("without"),
        "own thoughts": mean("own", thinks),
        "foreign thoughts": mean("foreign", differ),
        "mixing weight": mean("mixing weight", thinks),
        "gain": shown(estimate([record["without"] - record["own"] for record in records]) if thinks else None),
        "own - foreign": shown(gain),
        "verdict": "-" if gain is None else verdict(gain, len(records)),
    }


class Experiment:
    """All runs, kept in one folder.

    Args:
        options: Of the command line.

    Raises:
        ConfigError: The folder has another experiment.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, resolve_device(options.device, "--device")
        self.configuration(THINKING)  # refuses what is out of range
        self.tokenizer = load_tokenizer(options.model)
        self.train, self.pools = read_texts(options.texts, self.tokenizer, options.length, options.held_out)
        self.items = ItemStore(options.output / "texts.jsonl")
        self.file = options.output / "plan.json"
        ignored = ("output", "results", "threads")
        identity = {name: str(value) for name, value in vars(options).items() if name not in ignored}
        identity |= IndexedBatches(torch.cat([self.train, *self.pools]), 1, 0).fingerprint()
        self.state = self.before()
        if self.state and (changed := changed_options(self.state["identity"], identity)):
            raise ConfigError(
                f"--output: {options.output} has another run: {'; '.join(changed)}; choose another folder"
            )
        if not self.state:
            self.state = {"identity": identity, "spent": 0.0, "trained": {}, **self.plan()}
            write_json(self.file, self.state)
        steps = ", ".join(f"{name} {count}" for name, count in self.state["steps"].items() if count)
        print(f"planned: steps of {steps}; {self.state['texts']} texts to measure", file=sys.stderr, flush=True)
        self.texts = torch.cat(self.measured()).to(self.device)
        self.positions = torch.tensor(self.state["positions"], dtype=torch.int32, device=self.device)

    def before(self) -> dict[str, Any]:
        """What the folder says of the runs; nothing in a new one."""
        try:
            state: Any = read_json_file(self.file) if self.file.exists() else {}
        except ValueError:
            state = None
        if not isinstance(state, dict) or (state and not state.keys() >= STATE):
            raise ConfigError(f"--output: {self.file} is damaged; delete it, or choose another folder")
        return state

    def configuration(self, run: Run, steps: int = 1) -> TrainConfig:
        """The options of a run."""
        options = self.options
        names = ("thought_length", "lookahead", "thoughts_per_position", "positions")
        model = ModelOptions(**{name: getattr(options, name) for name in names})
        model.thinking = "pause" if run is PAUSE else "sample"
        training = TrainingOptions(method=run.method, steps=steps, warmup_steps=1 + steps // 10)
        for name in ("batch_size", "learning_rate", "seed", "device", "threads"):
            setattr(training, name, getattr(options, name))
        training.thought_embedding_lr_multiplier = options.thought_rate / options.learning_rate
        training.mixing_head_lr_multiplier = options.thought_rate / options.learning_rate
        training.eval_every, training.save_every, training.keep_checkpoints = 0, max(5, steps // 8), 1
        objective, data = ObjectiveOptions(policy_weight=run.policy_weight), DataOptions(length=options.length)
        config = TrainConfig("plain", model=model, data=data, objective=objective, training=training)
        return validate(config, required=())

    def model(self, run: Run) -> Any:
        """The model that a run begins with."""
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        config = self.configuration(run).model
        if run in (GIVEN, FIRST):
            torch.manual_seed(self.options.seed)  # the mixing head's first layers are random
            names = ("thought_length", "lookahead", "thoughts_per_position")
            thinking = {name: getattr(config, name) for name in names}
            model: Any = QuietStarForCausalLM.from_base(self.options.model, self.tokenizer, dtype=dtype, **thinking)
        else:
            path = latest_checkpoint(self.folder(FIRST) / "checkpoints")
            assert path is not None  # FIRST comes before
            model = load_causal_lm(path, dtype)
            model.config.thinking = config.thinking
        return model.to(self.device)

    def plan(self) -> dict[str, Any]:
        """Times the second step of each kind, since the first compiles or warms up; chooses the positions."""
        on_cpu = self.device.type == "cpu"
        model, at_once = self.model(GIVEN), 1 if on_cpu else self.options.batch_size
        batch = Batch(self.train[:at_once], None, [""] * at_once).to(self.device)
        pool = torch.cat(self.pools)[: max(2, at_once)].to(self.device)
        anchors = model.choose_anchors(pool, None, self.options.positions)

        def step(run: Run) -> None:
            compute_step(self.configuration(run))(model, batch, 0).loss.backward()
            model.zero_grad()

        def one_measure() -> None:
            for _ in measure(model, pool, anchors, range(len(pool)), at_once):
                pass

        scale = self.options.batch_size / len(batch)
        kinds: dict[str, tuple[Callable[[], None], float]] = {
            FIRST.method: (lambda: step(FIRST), scale),
            THINKING.method: (lambda: step(THINKING), scale),
            "text": (one_measure, 1 / len(pool)),
        }
        seconds = {}
        for name, (work, times) in kinds.items():
            for _ in range(2):
                begin = time.monotonic()
                work()
                if not on_cpu:
                    torch.cuda.synchronize(self.device)
                took = time.monotonic() - begin
                seconds[name] = times * took
                if on_cpu and took > ENOUGH_SECONDS:
                    break
        least, most = 2 * len(self.pools), sum(map(len, self.pools))
        self.state = {"seconds": seconds, **divide(seconds, self.options.minutes, least, most)}
        chosen = [
            model.choose_anchors(part.to(self.device), None, self.options.positions).tolist()
            for part in torch.cat(self.measured()).split(at_once)
        ]
        return {**self.state, "positions": list(chain.from_iterable(chosen))}

    def measured(self) -> list[Tensor]:
        """The texts of each file that are measured."""
        return [pool[: self.state["texts"] // len(self.pools)] for pool in self.pools]

    def folder(self, run: Run) -> Path:
        return Path(self.options.output / run.name.removeprefix("control: ").replace(" ", "-").lower())

    def trained(self, run: Run) -> QuietStarForCausalLM:
        """The model at the end of a run, which goes on where it was."""
        model: QuietStarForCausalLM = self.model(run)
        if run is not GIVEN:
            config = self.configuration(run, self.state["steps"][run.name])
            folder, step = self.folder(run), compute_step(config)
            trainer = Trainer(model, step, self.train, config.training, folder, progress_label=run.name)
            self.state["trained"][run.name] = round(trainer.run().seconds, 1)
        return model

    def run(self, write: Callable[[], None]) -> None:
        """Trains and measures what is not there yet, and writes after each row."""
        state, options = self.state, self.options
        partner = partners([len(texts) for texts in self.measured()])
        for run in RUNS:
            begin = time.monotonic()
            if run.name in state["left out"] or self.records(run):
                continue
            seconds = state["spent"] + state["steps"][run.name] * state["seconds"][run.method]
            if run in CONTROLS and seconds > 60 * LATE * options.minutes:
                state["left out"][run.name] = "what came before it took longer than planned"
            else:
                known = [self.items.get(f"{run.name}/{text}") is not None for text in range(len(self.texts))]
                thinks = run.measured != "no thoughts"
                place = (self.texts, self.positions, partner, options.batch_size, thinks, known.__getitem__)
                for text, values in measure(self.trained(run), *place):
                    self.items.add(f"{run.name}/{text}", values)
                state["spent"] += time.monotonic() - begin
            write_json(self.file, state)
            write()

    def records(self, run: Run) -> list[Any]:
        """What is measured of a run, in the order of the texts; nothing as long as a text is missing."""
        found = [self.items.get(f"{run.name}/{text}") for text in range(len(self.texts))]
        return [] if None in found else found

    def rows(self) -> list[dict[str, Any]]:
        """One row for each run that is measured."""
        state = self.state
        return [
            {"run": run.name, "steps": state["steps"][run.name], "seconds": state["trained"].get(run.name, 0.0)}
            | row_of(run, records)
            for run in RUNS
            if (records := self.records(run))
        ]

    def page(self) -> str:
        """The tables and what they mean."""
        options, state, rows = self.options, self.state, self.rows()
        lines, columns, steps = [], ["run", *COLUMNS], state["steps"][THINKING.name]
        if steps < SHORT_STEPS:
            size = f"{steps} steps of {options.batch_size} texts"
            lines.append(f"**A short run**, Quiet-STaR had {size}: it shows the command, not what thoughts can do.")
        lines += [f"Quiet-STaR: **{row['verdict']}**." for row in rows if row["run"] == THINKING.name]
        lines.append(markdown_table(columns, [[str(row[name]) for name in columns] for row in rows]))
        pairs = list(zip(self.records(PLAIN), self.records(THINKING), strict=False))
        if pairs:
            difference = shown(estimate([plain["without"] - thinking["own"] for plain, thinking in pairs]))
            lines.append(f"The control of language modelling, minus Quiet-STaR with its own thoughts: {difference}.")
        by_file = " + ".join(str(len(texts)) for texts in self.measured())
        seconds = ", ".join(f"{name} {value:.2f}" for name, value in state["seconds"].items())
        lines += [
            f"NLL in nats a token, mean over {len(self.texts)} held-out texts ({by_file} by file) of {options.length} "
            f"tokens, at the same positions in all rows ({options.positions}, by the given model). Gain: without minus "
            "with own thoughts. Own - foreign: with the thoughts of another text of the same file minus with its own. "
            f"Above 0 is good; 95 % intervals of Student's t over the texts; seed {options.seed} alone. A text is a "
            "window: those of one long document are not quite independent.",
            f"{options.minutes:g} minutes ({state['spent'] / 60:.1f} used): a third for measuring, of the rest 1 part "
            f"for language modelling first and 3 for each other run. Seconds a step and a measured text: {seconds}.",
        ]
        named = {row["run"] for row in rows}
        missing = {run.name: state["left out"].get(run.name, "not reached") for run in RUNS if run.name not in named}
        lines += [f"Left out: {name} ({reason})." for name, reason in missing.items()]
        return "\n\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="directory of a model and its tokenizer")
    parser.add_argument("--texts", required=True, nargs="+", metavar="FILE", help="or FILE:FIELD+FIELD of its rows")
    parser.add_argument("--minutes", type=float, required=True, help="for everything")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_folders("runs/real_model")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--held-out", type=int, default=100, help="texts to measure, at most")
    parser.add_argument("--batch-size", type=int, default=8, help="texts of a step")
    parser.add_argument("--positions", default="entropy:0.25", help="that think")
    parser.add_argument("--thought-length", type=int, default=8)
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--thoughts-per-position", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of the model")
    parser.add_argument("--thought-rate", type=float, default=1e-4, help="of START, END and the mixing head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_threads(None)
    options = parser.begin(arguments)
    bounds: dict[str, Any] = {"minutes": Positive, "length": Count, "held_out": Count, "learning_rate": Positive}
    for name, hint in {**bounds, "seed": Natural, "thought_rate": Positive}.items():
        check_number(f"--{name.replace('_', '-')}", getattr(options, name), hint)
    check_model_path(options.model, "--model")
    if not Path(options.model).is_dir():
        raise ConfigError(f"--model: {options.model} is not a directory; needs one with a model and its tokenizer")
    set_up(TrainingOptions(threads=options.threads, device=options.device))
    make_output_dir(options.output, "--output")
    with RunLock(options.output):
        experiment = Experiment(options)
        out = options.results / f"real_model_{options.device}"
        on = "a GPU" if options.device == "cuda" else "a CPU"
        title = f"Quiet-STaR on {Path(options.model).name}, {options.minutes:g} minutes of {on}"
        experiment.run(lambda: parser.save(out, title, experiment.page(), experiment.rows()))
        parser.write(out, title, experiment.page(), experiment.rows())


if __name__ == "__main__":
    sys.exit(run_command(main))
