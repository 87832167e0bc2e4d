"""Measures on held-out lines: the answer with and without thought, and the gain at every kind of character."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quietstar.demos.corpus import MODULUS, SYMBOLS, working
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.thoughts import Thoughts
from quietstar.objective.learning import learn

PLUS, EQUALS, NEWLINE = SYMBOLS.index("+"), SYMBOLS.index("="), SYMBOLS.index("\n")
CLASSES = ("operand", "+", "=", "answer", "newline")
SAMPLES = 2
"""Number of sampled thoughts per answer."""

ROWS = 64
"""Number of texts per forward pass."""

SEED = 20_240_318


@dataclass(frozen=True)
class Answers:
    """The answers in a batch of texts that contain the whole expression.

    Args:
        anchors: int64 [n, A], positions of the equals signs; a text with fewer repeats its last one.
        counted: bool [n, A], False for these repetitions.
        expressions: Operands before each equals sign, for each text.
    """

    anchors: Tensor
    counted: Tensor
    expressions: list[list[list[int]]]


def find_answers(tokens: Tensor) -> Answers:
    """Finds the answers in consecutive blocks of a text, int64 [n, L], that starts at the beginning of a line."""
    anchors: list[list[int]] = []
    expressions: list[list[list[int]]] = []
    previous = NEWLINE
    for row in tokens.tolist():
        start = 0 if previous == NEWLINE else None
        found: list[int] = []
        operands: list[list[int]] = []
        for place, token in enumerate(row):
            if token == EQUALS and start is not None and place + 1 < len(row):
                found.append(place)
                operands.append([value for value in row[start:place] if value != PLUS])
            if token == NEWLINE:
                start = place + 1
        previous = row[-1]
        if found:
            anchors.append(found)
            expressions.append(operands)
        else:
            anchors.append([0])
            expressions.append([])
    most = max(len(found) for found in anchors)
    padded = [found + [found[-1]] * (most - len(found)) for found in anchors]
    counted = [[index < len(operands) for index in range(most)] for operands in expressions]
    return Answers(torch.tensor(padded), torch.tensor(counted), expressions)


@dataclass(frozen=True)
class AnswerMeasures:
    """Means over held-out answers and sampled thoughts; NLLs in nats over the seven digits (chance: ln 7 = 1.946)."""

    nll_base: float
    nll_talk: float
    accuracy_base: float
    accuracy_talk: float
    correct_workings: float
    scrambled_nll: float
    mixing_weight: float


@torch.no_grad()
def measure_answers(model: QuietStarForCausalLM, tokens: Tensor) -> AnswerMeasures:
    """Predicts every answer of held-out texts without thought, with sampled thoughts, and with another text's thoughts.

    The logits are restricted to the digits, so that learning to leave out brackets does not count as a gain.

    Args:
        model: Thinking model to measure.
        tokens: int64 [n, L], consecutive blocks of the held-out text.
    """
    answers = find_answers(tokens)
    sums = torch.zeros(7, dtype=torch.float64)
    total = 0.0
    device = next(model.parameters()).device
    for start in range(0, len(tokens), ROWS):
        rows = tokens[start : start + ROWS].to(device)
        anchors = answers.anchors[start : start + ROWS].to(device)
        counted = answers.counted[start : start + ROWS].repeat_interleave(SAMPLES, dim=1).double()
        prediction = model.predict(
            rows, anchors=anchors, thoughts_per_position=SAMPLES, greedy=False, seed=SEED + start
        )
        target = rows.gather(1, prediction.thoughts.anchor.long() + 1)
        scrambled = model.predict(rows, thoughts=_of_the_next_text(prediction.thoughts))
        columns = [
            _nll(prediction.base_logits, target),
            _nll(prediction.talk_logits, target),
            _hit(prediction.base_logits, target),
            _hit(prediction.talk_logits, target),
            _correct(prediction.thoughts, answers.expressions[start : start + ROWS]),
            _nll(scrambled.talk_logits, target),
            prediction.mixing_weight,
        ]
        sums += torch.stack([(column.cpu().double() * counted).sum() for column in columns])
        total += float(counted.sum())
    return AnswerMeasures(*(sums / total).tolist())


@torch.no_grad()
def measure_characters(model: QuietStarForCausalLM, tokens: Tensor) -> dict[str, float]:
    """Returns the NLL of all characters without and with thought, and the gain of each kind of character, in nats.

    Returns:
        `base`, `talk`, and `gain <kind>` for the kinds of `CLASSES`.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    device = next(model.parameters()).device
    for start in range(0, len(tokens), ROWS):
        rows = tokens[start : start + ROWS].to(device)
        output = learn(model, rows, seed=SEED + start, reuse_sampling_pass=False, objective="paper")
        anchor = output.thoughts.anchor.long()
        kinds = _kinds(rows).gather(1, anchor + 1)
        base, talk = output.base_nll_at_target[..., 0], output.talk_nll[..., 0]
        for name, values, chosen in (
            ("base", base, torch.ones_like(kinds, dtype=torch.bool)),
            ("talk", talk, torch.ones_like(kinds, dtype=torch.bool)),
            *((f"gain {kind}", base - talk, kinds == index) for index, kind in enumerate(CLASSES)),
        ):
            sums[name] = sums.get(name, 0.0) + float((values * chosen).sum())
            counts[name] = counts.get(name, 0.0) + float(chosen.sum())
    return {name: value / counts[name] for name, value in sums.items()}


@torch.no_grad()
def sample_thoughts(model: QuietStarForCausalLM, tokens: Tensor, count: int) -> list[tuple[str, str]]:
    """Returns text up to an equals sign and one sampled thought there, for the first answer of `count` texts."""
    answers = find_answers(tokens[:count])
    rows = tokens[:count].to(next(model.parameters()).device)
    thoughts = model.think(rows, anchors=answers.anchors[:, :1].to(rows.device), thoughts_per_position=1, seed=SEED)
    return [
        (to_text(row[: anchor + 1]).rsplit("\n", 1)[-1], to_text(thought))
        for row, anchor, thought in zip(
            rows.tolist(), answers.anchors[:, 0].tolist(), thoughts.tokens[:, 0].tolist(), strict=True
        )
    ]


def to_text(tokens: list[int]) -> str:
    """Returns the characters of token ids; a pause (-1) is a dot."""
    return "".join(SYMBOLS[token] if token >= 0 else "." for token in tokens)


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    return -logits[..., :MODULUS].log_softmax(-1).gather(-1, target[..., None])[..., 0]


def _hit(logits: Tensor, target: Tensor) -> Tensor:
    return (logits[..., :MODULUS].argmax(-1) == target).float()


def _correct(thoughts: Thoughts, expressions: list[list[list[int]]]) -> Tensor:
    """Returns whether each thought is the true working, as far as it fits into the thought."""
    hits = torch.zeros(thoughts.tokens.shape[:2])
    for row, operands in enumerate(expressions):
        for index, digits in enumerate(operands):
            wanted = working(digits)[: thoughts.tokens.shape[-1]]
            for sample in range(SAMPLES):
                stream = index * SAMPLES + sample
                hits[row, stream] = to_text(thoughts.tokens[row, stream].tolist()).startswith(wanted)
    return hits


def _of_the_next_text(thoughts: Thoughts) -> Thoughts:
    return replace(thoughts, tokens=thoughts.tokens.roll(1, 0))


def _kinds(rows: Tensor) -> Tensor:
    """Returns the index of each character's kind in `CLASSES`."""
    after_equals = torch.zeros_like(rows, dtype=torch.bool)
    after_equals[:, 1:] = rows[:, :-1] == EQUALS
    kinds = torch.zeros_like(rows)
    for index, chosen in enumerate((rows < MODULUS, rows == PLUS, rows == EQUALS, after_equals, rows == NEWLINE)):
        kinds[chosen] = index
    return kinds
