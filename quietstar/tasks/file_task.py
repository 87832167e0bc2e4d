"""What tasks have in common whose problems are read from files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from quietstar.errors import ConfigError, DataError
from quietstar.tasks.public_home import PublicHome
from quietstar.tasks.records import Record, find_files, read_records
from quietstar.tasks.solved_examples import solved_examples
from quietstar.tasks.task import Problem, Split, Task

if TYPE_CHECKING:
    from quietstar.tasks.options import ProblemOptions


class FileTask(Task):
    """A task whose problems are the records of files, each read once, when it is first asked for.

    Args:
        options: Where the files are.

    Attributes:
        train_files: What the files of the training problems are called in a directory, as patterns.
        test_files: The same of the held-out problems.
        home: Where they are published.
        published_examples: Name of its solved examples in the folder `few_shot`.
        left_out: Problems of each split read so far that the task cannot use, by intention.
    """

    train_files: ClassVar[tuple[str, ...]]
    test_files: ClassVar[tuple[str, ...]]
    home: ClassVar[PublicHome | None] = None
    published_examples: ClassVar[str | None] = None

    def __init__(self, options: ProblemOptions) -> None:
        self.options = options
        self.left_out: dict[Split, int] = {}
        self._problems: dict[Split, list[Problem]] = {}

    @abstractmethod
    def read(self, record: Record, number: int) -> Problem | None:
        """The problem of a record; None where the task leaves it out.

        Args:
            record: What the file has.
            number: From 1, among the problems of the split; an id where there is no other.

        Raises:
            DataError: The record has not what a problem needs.
        """

    def problems(self, split: Split) -> Sequence[Problem]:
        if split not in self._problems:
            read = [self.read(record, number) for number, record in enumerate(self._records(split), start=1)]
            kept = [problem for problem in read if problem is not None]
            _check_ids(kept)
            if not kept:
                raise DataError(f"{self.name}: there are no {split} problems, {len(read)} were left out; needs one")
            self.left_out[split] = len(read) - len(kept)
            self._problems[split] = kept
        return self._problems[split]

    def _records(self, split: Split) -> Iterable[Record]:
        files = find_files(self.options, split, self.train_files if split == "train" else self.test_files)
        if files:
            return (record for file in files for record in read_records(file))
        if self.home is None:
            raise ConfigError(f"problems.path: missing; the task {self.name} needs a file or directory of problems")
        return self.home.records(split)

    def few_shot(self, hint: bool = False) -> str:
        return solved_examples(self.options, hint, self.published_examples)


def _check_ids(problems: Sequence[Problem]) -> None:
    first: dict[str, str] = {}
    for problem in problems:
        if problem.id in first:
            known = f"{problem.place}: the id {problem.id!r} is that of {first[problem.id]} already"
            raise DataError(f"{known}; each problem needs its own")
        first[problem.id] = problem.place
