"""`python -m quietstar.view CHECKPOINT --text FILE`: a page of what a model thinks at each token of a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from quietstar.config.command_line import run_command
from quietstar.config.values import DTYPES, check_device
from quietstar.data.sources import STANDARD_INPUT, read_text
from quietstar.errors import ConfigError
from quietstar.reporting.any_report import write_any_report
from quietstar.reporting.viewer import ViewOptions
from quietstar.runs.checkpoints import checkpoint_directory
from quietstar.runs.directory import model_name, run_of, training_length
from quietstar.runs.files import THOUGHTS, make_output_dir


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: view(arguments))


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    default = ViewOptions()
    p = argparse.ArgumentParser(
        prog="python -m quietstar.view",
        description="Writes one HTML page that shows, token by token, what a model thinks about a text and what that "
        "gains, and the data as JSON beside it.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a thinking model: directory, training run or hub name")
    p.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text file; - is standard input")
    p.add_argument(
        "--out", metavar="FILE", help=f"default: {THOUGHTS} in the directory of CHECKPOINT's run, or else in this one"
    )
    p.add_argument("--tokens", type=int, default=default.tokens, help="show the first so many (default: %(default)s)")
    p.add_argument("--thoughts", type=int, metavar="K", help="thoughts per position; default: as the model was trained")
    p.add_argument("--top_k", type=int, default=default.top_k, help="next tokens to list (default: %(default)s)")
    p.add_argument("--temperature", type=float, help="of thoughts; default: as the model was trained")
    p.add_argument("--greedy", action="store_true", help="the most probable thought instead of sampled ones")
    p.add_argument("--seed", type=int, default=default.seed, help="of thoughts (default: %(default)s)")
    p.add_argument("--positions", default=default.positions, help="all, every:N or entropy:K (default: %(default)s)")
    p.add_argument(
        "--window",
        type=int,
        help="tokens that the model reads at once, half of them overlapping; default: the length of its training "
        "texts, or what its context holds",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as saved")
    p.add_argument("--tokenizer", metavar="DIR", help="where the checkpoint has none beside it")
    return p


def view(arguments: argparse.Namespace) -> None:
    """Writes the page, and the report of the run that it belongs to again.

    Raises:
        ConfigError: An option is out of range, or there is no model that thinks.
        DataError: The text cannot be used.
        CheckpointError: The checkpoint is damaged.
    """
    names = ("tokens", "thoughts", "top_k", "temperature", "greedy", "seed", "positions", "window")
    options = ViewOptions(  # checked before a model is loaded
        **{name: getattr(arguments, name) for name in names},
        text_name="standard input" if arguments.text == STANDARD_INPUT else Path(arguments.text).name,
    )
    check_device(arguments.device, "device")
    text = read_text(arguments.text)
    directory = Path(checkpoint_directory(arguments.checkpoint))
    run = run_of(directory)
    out = Path(arguments.out) if arguments.out else (run or Path()) / THOUGHTS
    if out.is_dir() or out.suffix == ".json":
        kind = "a directory" if out.is_dir() else "the name of the data"
        raise ConfigError(f"out: {out} is {kind}, needs the name of a page, e.g. {out.with_name(THOUGHTS)}")
    make_output_dir(out.parent, "out")
    from quietstar.inference.loading import load_thinking  # torch comes with it, after all that can be refused before
    from quietstar.inference.viewed_thoughts import thoughts_of
    from quietstar.reporting.viewer import write_page

    model, tokenizer = load_thinking(
        directory, device=arguments.device, dtype=arguments.dtype, tokenizer=arguments.tokenizer
    )
    options = replace(options, training_length=training_length(directory), model_name=model_name(directory))
    with tqdm(desc="thinking", unit="token", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        content = thoughts_of(model, tokenizer, text, options, progress)
    if content["text"]["cut"]:
        name, shown = options.text_name, len(content["text"]["tokens"])
        print(f"{name}: goes on; only its first {shown} tokens are shown (--tokens)", file=sys.stderr)
    print(write_page(content, out))
    if run is not None and out.resolve() == (run / THOUGHTS).resolve():
        print(write_any_report(run))


if __name__ == "__main__":
    sys.exit(main())
