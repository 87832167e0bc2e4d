"""What `quietstar.view` does: the page of a text, and the report of the run that it belongs to again."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from quietstar.config.checkpoint import CheckpointOptions
from quietstar.config.command_line import Command
from quietstar.data.sources import STANDARD_INPUT, read_text
from quietstar.errors import ConfigError
from quietstar.reporting.any_report import write_any_report
from quietstar.reporting.viewer import ViewOptions
from quietstar.runs.checkpoints import checkpoint_directory
from quietstar.runs.directory import model_name, run_of, training_length
from quietstar.runs.files import THOUGHTS, make_output_dir


@dataclass(frozen=True, kw_only=True)
class ViewCommandOptions(ViewOptions, CheckpointOptions):
    """Writes one HTML page that shows, token by token, what a model thinks about a text and what that gains.

    The data are written as JSON beside it.

    Args:
        text: Text file in UTF-8; `-` is standard input.
        out: File of the page. Null: thoughts.html in the directory of the checkpoint's run, or else in this one.
    """

    text: str
    out: Path | None = None


VIEW = Command("view", ViewCommandOptions, argument="checkpoint")


def view(options: ViewCommandOptions) -> None:
    """Writes the page, and the report of the run that it belongs to again.

    Raises:
        ConfigError: An option is out of range, or there is no model that thinks.
        DataError: The text cannot be used.
        CheckpointError: The checkpoint is damaged.
    """
    text_name = "standard input" if options.text == STANDARD_INPUT else Path(options.text).name
    text = read_text(options.text)
    directory = Path(checkpoint_directory(options.checkpoint))
    run = run_of(directory)
    out = options.out or (run or Path()) / THOUGHTS
    if out.is_dir() or out.suffix == ".json":
        kind = "a directory" if out.is_dir() else "the name of the data"
        raise ConfigError(f"out: {out} is {kind}, needs the name of a page, e.g. {out.with_name(THOUGHTS)}")
    make_output_dir(out.parent, "out")
    from quietstar.inference.loading import load_thinking  # torch comes with it, after all that can be refused before
    from quietstar.inference.viewed_thoughts import thoughts_of
    from quietstar.reporting.viewer import write_page

    model, tokenizer = load_thinking(directory, device=options.device, dtype=options.dtype, tokenizer=options.tokenizer)
    options = replace(
        options, training_length=training_length(directory), model_name=model_name(directory), text_name=text_name
    )
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
