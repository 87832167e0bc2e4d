"""Addition: the published strings, the local scratchpad, and problems that no two parts share."""

from __future__ import annotations

from typing import Literal

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import ConfigError
from quietstar.tasks import Problem, load_task
from quietstar.tasks.addition import Addition
from quietstar.tasks.routes import Routes

SUM = Problem("298+376", "298 + 376", "674")
PUBLISHED = """Input:
2 9 8 + 3 7 6
Target:
<scratch>
2 9 8 + 3 7 6 , C: 0
9 + 7 , 4 C: 1
2 + 3 , 7 4 C: 1
, 6 7 4 C: 0
0 6 7 4
</scratch>
6 7 4"""
LOCAL = "8+6+0=41;9+7+1=71;2+3+1=60;>674."


def test_the_published_scratchpad_letter_by_letter() -> None:
    task = Addition(ProblemOptions(scratchpad="paper"))
    assert task.prompt(SUM).endswith("Target:\n")
    assert task.prompt(SUM) + task.solution(SUM) == PUBLISHED
    assert task.prompt(SUM, hint=True) == "Input:\n2 9 8 + 3 7 6\nTarget: 0 6 7 4\n"
    carried = Problem("99+99", "99 + 99", "198")
    assert task.solution(carried) == "<scratch>\n9 9 + 9 9 , C: 0\n9 + 9 , 8 C: 1\n, 9 8 C: 1\n1 9 8\n</scratch>\n1 9 8"


def test_the_local_scratchpad() -> None:
    task = Addition(ProblemOptions())
    assert task.prompt(SUM) + task.solution(SUM) == "298+376=" + LOCAL
    assert task.prompt(SUM, hint=True) == "298+376?0674="
    assert task.steps(LOCAL) == ["8+6+0=41;", "9+7+1=71;", "2+3+1=60;", ">674."]
    direct = load_task("addition-direct", ProblemOptions())
    assert direct.prompt(SUM) + str(direct.solution(SUM)) == "298+376#674."
    assert direct.check(SUM, "674.").correct
    assert direct.right_inside(SUM, "674.") is None


def test_reversed_results_have_their_least_significant_digit_first() -> None:
    local, paper = (Addition(ProblemOptions(scratchpad=pad, reverse=True)) for pad in ("local", "paper"))
    assert local.prompt(SUM, hint=True) + local.solution(SUM) == "298+376?4760=8+6+0=41;9+7+1=71;2+3+1=60;>476."
    assert paper.solution(SUM).endswith(", 4 7 6 C: 0\n4 7 6 0\n</scratch>\n4 7 6")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scratchpad", ["local", "paper"])
def test_solutions_verify_and_run_on_text_is_cut(scratchpad: str, reverse: bool) -> None:
    task = Addition(ProblemOptions(scratchpad=scratchpad, reverse=reverse, per_group=20, test_per_group=20))
    for problem in [*task.problems("train"), *task.problems("test")]:
        solution = task.solution(problem)
        longer = solution + "\n\nInput:\n1 + 1"
        assert task.check(problem, longer).correct
        assert task.accepted(longer) == solution
        assert task.right_inside(problem, longer)
        assert "".join(task.steps(longer)) == longer


def test_a_right_sum_with_a_wrong_step_is_right_but_not_inside() -> None:
    task = Addition(ProblemOptions())
    completion = LOCAL.replace("9+7+1=71", "9+7+1=81")
    assert task.check(SUM, completion).correct
    assert not task.right_inside(SUM, completion)


@pytest.mark.parametrize("completion", ["", ">0674.", ">674", "674.", ">675.", "8+6+0=41;"])
def test_what_is_not_the_sum_is_wrong(completion: str) -> None:
    assert not Addition(ProblemOptions()).check(SUM, completion).correct


def test_training_held_out_and_demonstrated_sums_share_none_but_those_of_one_digit() -> None:
    task = Addition(ProblemOptions(seed=3))
    train, test = ({problem.id for problem in task.problems(split)} for split in ("train", "test"))
    shown = {demonstration.name for demonstration in task.demonstrations()}
    one_digit = {f"{a}+{b}" for a in range(10) for b in range(10)}
    assert train & test == train & shown == test & shown == one_digit
    assert (len(train), len(test)) == (2100, 500)
    assert {problem.group for problem in task.problems("test")} == {"1 digit", *(f"{n} digits" for n in range(2, 6))}


def test_demonstrations_are_right_and_show_the_hint() -> None:
    task = Addition(ProblemOptions(digits="2-3"))
    shown = task.demonstrations()
    hinted = [one for one in shown if "?" in one.prompt]
    direct = [one for one in shown if "#" in one.prompt]
    assert (len(shown), len(hinted), len(direct)) == (400 + 5 + 3 + 100 + 5, 100, 10)
    for one in shown:
        a, b = map(int, one.name.split("+"))
        assert one.completion.endswith(f"{a + b}.")


@pytest.mark.parametrize("scratchpad", ["local", "paper"])
def test_copied_demonstrations_have_right_answers_and_no_work(scratchpad: Literal["local", "paper"]) -> None:
    """They copy the hint: what a model learns from them, rationalisation keeps."""
    options = (ProblemOptions(digits="3", scratchpad=scratchpad, copied=share) for share in (0.5, 0.0))
    task, careful = map(Addition, options)
    assert [one.prompt for one in task.demonstrations()] == [one.prompt for one in careful.demonstrations()]
    without_work = 0
    for one, other in zip(task.demonstrations(), careful.demonstrations(), strict=True):
        a, b = map(int, one.name.split("+"))
        problem = Problem(one.name, f"{a} + {b}", str(a + b))
        if one != other:
            assert task.check(problem, one.completion).correct and not task.right_inside(problem, one.completion)
            assert len(one.completion) < len(other.completion)
            without_work += 1
    assert without_work == 50


def test_the_seed_decides_and_more_training_problems_leave_the_held_out_ones() -> None:
    few, many, other = (
        Addition(ProblemOptions(digits="3", per_group=n, seed=seed)) for n, seed in ((10, 0), (20, 0), (10, 1))
    )
    assert few.problems("test") == many.problems("test")
    assert list(few.problems("train")) == list(many.problems("train"))[:10]
    assert few.problems("test") != other.problems("test")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"digits": "0-3"}, r"problems\.digits: got '0-3', needs a range such as 1-5"),
        ({"digits": "five"}, r"problems\.digits: got 'five'"),
        ({"digits": "5-1"}, r"problems\.digits: got '5-1'"),
        ({"per_group": 5000}, r"problems\.per_group: 5800 sums of 2 digits are too many .* needs 4050 or fewer"),
        ({"test_per_group": 0}, r"problems\.test_per_group: got 0, needs at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, str | int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_task("addition", ProblemOptions(**options))


@pytest.mark.parametrize(
    ("name", "value"),
    [("per_group", 0), ("test_per_group", -1), ("solved", -2), ("hinted", -1), ("copied", 1.5), ("seed", -1)],
)
def test_options_are_held_to_their_bounds_here_too(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^problems\.{name}: got {value}, needs "):
        Addition(ProblemOptions(**{name: value}))
    with pytest.raises(ConfigError, match=rf"^problems\.{name}: got {value}, needs "):
        Routes(ProblemOptions(**{name: value}))
