"""Problems, prompts, hints and answer checks.

Nothing here imports torch, so that the processes that check answers start quickly.
"""

from quietstar.config.loops import ProblemOptions
from quietstar.tasks.checking import Checker
from quietstar.tasks.registry import TASKS, load_task
from quietstar.tasks.task import Demonstration, Problem, Split, Task, Verdict

__all__ = ["TASKS", "Checker", "Demonstration", "Problem", "ProblemOptions", "Split", "Task", "Verdict", "load_task"]
