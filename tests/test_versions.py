"""Which releases are allowed, which are pinned, and which were tested: three lists that have to agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from quietstar.model.upstream import NEWEST_TESTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def pinned(python: str) -> dict[str, Version]:
    """What constraints.txt says for a version of Python on Linux."""
    marks = {"python_full_version": f"{python}.1", "python_version": python, "sys_platform": "linux"}
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(marks):
                (exact,) = requirement.specifier
                assert exact.operator == "==" and requirement.name not in found, line
                found[canonicalize_name(requirement.name)] = Version(exact.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_that_the_readme_installs_is_pinned_within_its_range(python: str) -> None:
    extras = PROJECT["optional-dependencies"]["test"]
    found = pinned(python)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert version in requirement.specifier, f"{requirement} does not allow the pinned {version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_pinned_was_tested(python: str) -> None:
    found = pinned(python)
    for name, newest in NEWEST_TESTED.items():
        assert found[name] <= Version(newest), f"constraints.txt pins a {name} that NEWEST_TESTED does not know"
    assert found["transformers"] == Version(NEWEST_TESTED["transformers"])


def test_the_range_of_torch_ends_behind_the_newest_tested() -> None:
    """Torch is no library whose next minor release can be taken on trust."""
    torch = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    major, minor = Version(NEWEST_TESTED["torch"]).release[:2]
    assert Version(NEWEST_TESTED["torch"]) in torch.specifier
    assert Version(f"{major}.{minor + 1}.0") not in torch.specifier


def test_the_readme_installs_under_the_constraints() -> None:
    commands = re.findall(r"^python -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    assert all("pip install -c constraints.txt " in command for command in commands)
    supported = {
        f"3.{minor}"
        for minor in range(30)
        if Version(f"3.{minor}") in Requirement(f"python{PROJECT['requires-python']}").specifier
    }
    assert supported == set(PYTHONS)
