"""STaR on a task of your own: the sum of three digits modulo 7, worked out digit by digit.

`472=` is to go on as `4:4,7:4,2:6>6.`: each digit with the remainder so far, then the answer. 150 problems come with
their solution; of 450 others the loop knows the answer alone and keeps what it works out right. Run as a script, this
file starts `python -m quietstar.star` with a small character model, made on the spot. About 25 seconds on a CPU.
"""

import random
import re
import subprocess
import sys

from quietstar.tasks import Problem, Task

SOLVED, TRAINED_ON = 150, 600
OPTIONS = """
--preset addition --controls false --output_dir runs/own-task
--characters.layers 2 --characters.hidden_size 64 --characters.steps 200 --characters.learning_rate 4e-3
--sampling.max_new_tokens 20 --loop.rationalize false --loop.iterations 2 --loop.start_steps 100
--training.learning_rate 4e-3
"""


class Remainders(Task):
    name = "remainders"
    isolated = False  # its check cannot hang, so it needs no process of its own
    symbols = "0123456789=:,>."  # all that the character model reads and writes

    def problems(self, split):
        numbers = [f"{number:03}" for number in range(1000)]
        random.Random(0).shuffle(numbers)
        if split == "test":
            return [problem(number) for number in numbers[-200:]]
        return [problem(number, solved=place < SOLVED) for place, number in enumerate(numbers[:TRAINED_ON])]

    def prompt(self, problem, hint=False):
        return f"{problem.question}>{problem.answer}=" if hint else f"{problem.question}="

    def extract(self, completion):
        found = re.search(r">(\d)\.$", completion)
        return found[1] if found else None


def problem(number, solved=False):
    remainders = [sum(int(digit) for digit in number[: place + 1]) % 7 for place in range(3)]
    working = ",".join(f"{digit}:{remainder}" for digit, remainder in zip(number, remainders, strict=True))
    answer = str(remainders[-1])
    return Problem(id=number, question=number, answer=answer, rationale=f"{working}>{answer}." if solved else None)


def make_task(options):  # options: the values of --problems.*, none of which this task needs
    return Remainders()


if __name__ == "__main__":
    command = [sys.executable, "-m", "quietstar.star", "--task", f"{__file__}:make_task"]
    sys.exit(subprocess.call([*command, *OPTIONS.split(), *sys.argv[1:]]))
