"""The options of tasks, for modules of your own that make one: `quietstar.tasks.options.ProblemOptions`."""

from quietstar.config.loops import ProblemOptions

__all__ = ["ProblemOptions"]
