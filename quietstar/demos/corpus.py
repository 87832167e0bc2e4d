"""The textbook: sums modulo 7, some with a worked aside, most with a useless one.

2+6+4+3=1                direct
2+6+4+3=[2,1,5,1]1       worked aside: the running sums
2+6+4+3=[2+6+4+3]1       useless aside of the same length
"""

from __future__ import annotations

import hashlib
import random

MODULUS = 7
SYMBOLS = "0123456+=[],\n"
DIRECT_SHARE = 0.2
HELD_OUT_SHARE = 0.1


def working(digits: list[int]) -> str:
    """Returns the running sums modulo 7, e.g. "2,1,5,1" for 2+6+4+3."""
    total, sums = 0, []
    for digit in digits:
        total = (total + digit) % MODULUS
        sums.append(str(total))
    return ",".join(sums)


def is_held_out(digits: list[int]) -> bool:
    """Returns whether the hash of an expression keeps it out of all training, which holds for a tenth of them."""
    digest = hashlib.sha256(" ".join(map(str, digits)).encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT_SHARE * 2**32


def direct_line(digits: list[int]) -> str:
    """Returns a line such as `2+6+4+3=1` with its line break."""
    return f"{'+'.join(map(str, digits))}={sum(digits) % MODULUS}\n"


def textbook_line(digits: list[int], useful_asides: float, rng: random.Random) -> str:
    """Returns a line of the textbook; its kind is random."""
    expression, answer = "+".join(map(str, digits)), sum(digits) % MODULUS
    if rng.random() < DIRECT_SHARE:
        return direct_line(digits)
    aside = working(digits) if rng.random() < useful_asides else expression
    return f"{expression}=[{aside}]{answer}\n"


def draw(counts: range, held_out: bool, rng: random.Random) -> list[int]:
    """Returns the operands of a random expression on one side of the split."""
    while True:
        digits = [rng.randrange(MODULUS) for _ in range(rng.choice(counts))]
        if is_held_out(digits) == held_out:
            return digits


def textbook_text(pages: int, page_length: int, counts: range, useful_asides: float, seed: int) -> str:
    """Returns the textbook without held-out expressions, in pages of `page_length` characters.

    A page starts with a new line and ends where it is full, so that every training text starts at the start of a line.
    """
    rng, made = random.Random(f"textbook {seed}"), []
    for _ in range(pages):
        page = ""
        while len(page) < page_length:
            page += textbook_line(draw(counts, False, rng), useful_asides, rng)
        made.append(page[:page_length])
    return "".join(made)


def direct_text(characters: int, counts: range, held_out: bool, seed: int) -> str:
    """Returns direct lines of at least `characters` characters in total."""
    rng, lines, size = random.Random(f"direct {held_out} {seed}"), [], 0
    while size < characters:
        lines.append(direct_line(draw(counts, held_out, rng)))
        size += len(lines[-1])
    return "".join(lines)
