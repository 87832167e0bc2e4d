"""V-STaR on the task of star_own_task.py: train a verifier, then let it rank candidates by itself.

`python -m quietstar.vstar` samples solutions and trains a verifier on right and wrong ones. `quietstar.Verifier` then
scores, for held-out problems, the right working among three with one wrong step. About 30 seconds on a CPU.
"""

import random
import subprocess
import sys
from pathlib import Path

from star_own_task import Remainders, problem

import quietstar

OPTIONS = """
--preset routes --characters.layers 2 --characters.hidden_size 64 --characters.steps 200
--characters.learning_rate 4e-3 --sampling.samples 8 --sampling.max_new_tokens 20 --loop.iterations 1
--loop.supervised_start false --loop.start_steps 100 --training.learning_rate 4e-3
--verifier.steps 100 --verifier.baselines false --evaluation.candidates 8
"""


def with_a_wrong_step(number, source):
    """The right working with one remainder changed, and what follows from it worked out rightly."""
    place, shift, remainder, steps = source.randrange(3), source.randrange(1, 7), 0, []
    for position, digit in enumerate(number):
        remainder = (remainder + int(digit) + (shift if position == place else 0)) % 7
        steps.append(f"{digit}:{remainder}")
    return ",".join(steps) + f">{remainder}."


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-verifier")
    task = Path(__file__).with_name("star_own_task.py")
    command = [sys.executable, "-m", "quietstar.vstar", "--task", f"{task}:make_task", "--output_dir", str(out)]
    subprocess.run([*command, *OPTIONS.split()], check=True)

    verifier = quietstar.Verifier(out / "verifiers/dpo/model")
    source, first = random.Random(0), 0
    held_out = Remainders().problems("test")
    for asked in held_out:
        right = problem(asked.question, solved=True).rationale
        candidates = [right, *(with_a_wrong_step(asked.question, source) for _ in range(3))]
        scores = verifier.score(f"{asked.question}=", candidates)  # the higher, the better
        first += scores[0] > max(scores[1:])
    print("\n".join(f"{score:8.2f}  {text}" for score, text in sorted(zip(scores, candidates, strict=True))[::-1]))
    print(f"the right one of 4 is first in {first} of {len(held_out)} held-out problems")
