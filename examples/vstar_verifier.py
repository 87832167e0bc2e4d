"""A V-STaR verifier that ranks candidates: which of two solutions is right? About 25 seconds on a CPU.

The base has read sums modulo 7 (`472=4:4,7:4,2:6>6.`) by a careless hand: a step that passes 7 is one too low six times
in ten. `python -m quietstar.vstar` samples solutions, checks them and trains a verifier on right and wrong ones.
"""

import random
import subprocess
import sys
from pathlib import Path

import quietstar
from quietstar.tasks import Demonstration, Problem, Task

OPTIONS = """
--preset routes --characters.layers 2 --characters.hidden_size 64 --characters.steps 250 --characters.learning_rate 4e-3
--sampling.samples 8 --loop.iterations 1 --loop.supervised_start false --loop.start_steps 20 --loop.demonstrations false
--verifier.steps 80 --verifier.batch_size 16 --verifier.baselines false --evaluation.candidates 0
"""
NUMBERS = random.Random(0).sample([f"{number:03}" for number in range(1000)], 1000)


def worked_out(number, too_low=0.0, source=random):
    value, steps = 0, []
    for digit in map(int, number):
        value = (value + digit - (value + digit >= 7 and source.random() < too_low)) % 7
        steps.append(f"{digit}:{value}")
    return ",".join(steps) + f">{value}."


class CarelessSums(Task):
    name, isolated, symbols = "careless-sums", False, "0123456789=:,>."

    def problems(self, split):
        numbers = NUMBERS[:200] if split == "train" else NUMBERS[800:]
        return [Problem(id=n, question=n, answer=self.extract(worked_out(n))) for n in numbers]

    def prompt(self, problem, hint=False):
        return f"{problem.question}="

    def extract(self, completion):
        return completion.rpartition(">")[2].rstrip(".") or None

    def pretraining(self):
        return [Demonstration(f"{n}=", worked_out(n, 0.6, random.Random(n))) for n in NUMBERS[:800]]


def make_task(options):
    return CarelessSums()


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-verifier")
    command = [sys.executable, "-m", "quietstar.vstar", "--task", f"{__file__}:make_task", "--output_dir", str(out)]
    subprocess.run([*command, *OPTIONS.split()], check=True)
    pairs = {n: [worked_out(n), worked_out(n, 1.0)] for n in NUMBERS[800:] if worked_out(n) != worked_out(n, 1.0)}
    for name, model in (("base", "base"), ("new generator", "iteration-01"), ("verifier", "verifiers/dpo")):
        verifier = quietstar.Verifier(out / model / "model")
        scores = [verifier.score(f"{n}=", pair) for n, pair in pairs.items()]  # the higher, the better
        print(f"{name}: the right one first in {sum(a > b for a, b in scores)} of {len(pairs)} held-out problems")
