"""Where the problems of known tasks are published: read from there when no file of them is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from quietstar.errors import ConfigError, QuietStarError
from quietstar.tasks.records import NumberText, Record

if TYPE_CHECKING:
    from quietstar.tasks.task import Split


@dataclass(frozen=True)
class PublicHome:
    """A dataset of the Hugging Face hub, and where else its files can be had.

    Args:
        dataset: `owner/name`.
        train: Pattern of the parquet files with training problems.
        test: Pattern of those with held-out problems.
        download: Web page from which the task's own files can be downloaded.
        files: What they are called, for messages.
    """

    dataset: str
    train: str
    test: str
    download: str
    files: str

    def records(self, split: Split) -> Iterator[Record]:
        """The rows of a split, in the order of the files.

        Raises:
            ConfigError: pyarrow is not installed, or the hub cannot be reached.
        """
        # both only here: processes that check answers read no problems, and these imports take seconds
        from quietstar.data.shards import find_shards

        try:
            parquet: Any = import_module("pyarrow.parquet")
        except ImportError:
            raise ConfigError(f"problems.path: missing, and {self._needs('pyarrow is not installed')}") from None
        try:
            for shard in find_shards(self.dataset, self.train if split == "train" else self.test):
                with shard.open() as file:
                    rows = parquet.read_table(file).to_pylist()
                for number, row in enumerate(rows, start=1):
                    yield Record(f"{shard.path}:{number}", {name: _as_text(value) for name, value in row.items()})
        except QuietStarError as error:
            raise ConfigError(f"problems.path: missing, and {self._needs(str(error))}") from error
        except OSError as error:  # of huggingface_hub's network client
            raise ConfigError(f"problems.path: missing, and {self._needs(f'reading failed: {error}')}") from error

    def _needs(self, reason: str) -> str:
        return (
            f"the hub dataset {self.dataset} cannot be read ({reason}). Install 'quietstar[data]' and go online, or "
            f"download {self.files} from {self.download} and give their directory"
        )


def _as_text(value: Any) -> Any:
    return NumberText(value) if type(value) in (int, float) else value
