"""What a run would do, before anything is done."""

from __future__ import annotations

import json

from quietstar.data import load_tokenizer
from quietstar.data.encoding import encode_prompt
from quietstar.outer_loop.config import OuterLoopConfig
from quietstar.outer_loop.schedule import fine_tuning_steps
from quietstar.tasks.registry import load_task


def describe(config: OuterLoopConfig) -> None:
    """Prints what a run would do: problems, a prompt, lengths and numbers of samples and steps. Reads no weights."""
    task = load_task(config.task, config.problems)
    train, test = task.problems("train"), task.problems("test")
    drawn = len(train) if config.problems.limit is None else min(config.problems.limit, len(train))
    print(f"task {task.name}: {len(train)} training problems, {len(test)} held out; {drawn} drawn for each iteration")
    print(f"samples: {drawn * config.sampling.samples} an iteration, {config.loop.iterations} iterations")
    if config.loop.schedule == "epochs":
        print(f"fine-tuning: {config.loop.start_epochs:g} epochs, {config.loop.added_epochs:g} more each iteration")
    else:
        steps = [fine_tuning_steps(i, config.loop, 1, 1) for i in range(1, config.loop.iterations + 1)]
        print(f"fine-tuning steps: {', '.join(map(str, steps))}; {sum(steps)} in all")
    before = task.few_shot() if config.sampling.few_shot else ""
    if config.model.path is not None:
        tokenizer = load_tokenizer(config.model.path)
        lengths = sorted(len(encode_prompt(tokenizer, before + task.prompt(problem))) for problem in (*train, *test))
        print(f"prompts: {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at most")
        print(
            f"with {config.sampling.max_new_tokens} new tokens the longest text has "
            f"{lengths[-1] + config.sampling.max_new_tokens}"
        )
    for title, hint in (("a prompt", False), ("the same with the hint", True)):
        print(f"{title}:\n{json.dumps(task.prompt(train[0], hint), ensure_ascii=False)}")
