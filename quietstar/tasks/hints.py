"""Rationales that speak of the hint they were given, and so make no sense without it."""

from __future__ import annotations

import re

_TELLS = re.compile(
    r"""\(correct\)
    | \bthe\ hint\b | \bhinted\b | \bas\ hinted | \bhint\ (?:says|tells|shows)
    | \bgiven\ (?:that\ )?the\ (?:correct\ |right\ |final\ )?answer
    | \b(?:since|because|as|knowing)\ (?:that\ )?the\ (?:correct\ |right\ |final\ )?answer\ (?:is|was|must\ be)
    | \bthe\ (?:correct\ |right\ |final\ )?answer\ (?:is|was)\ (?:already\ )?(?:given|provided|marked|shown|known)
    | \b(?:marked|labell?ed|indicated|shown)\ as\ (?:the\ )?(?:correct|right)
    | \bwe\ (?:already\ )?(?:know|are\ told|were\ told)\ (?:that\ )?the\ (?:correct\ |right\ |final\ )?answer
    | \bthe\ (?:answer|number|value)\ in\ (?:the\ )?(?:parentheses|brackets)""",
    re.IGNORECASE | re.VERBOSE,
)


def speaks_of_hint(completion: str) -> bool:
    """Whether a rationale mentions a hint or an answer that is already known."""
    return _TELLS.search(" ".join(completion.split())) is not None


def begins_with_hint(completion: str, answer: str) -> bool:
    """Whether a rationale repeats `(answer)`, as it stands in the question, on its first line."""
    first = completion.strip().partition("\n")[0]
    return f"({answer})" in first
