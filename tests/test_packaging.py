"""constraints.txt pins everything that an installation brings, and nothing local."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    """Name -> exact version, as constraints.txt has them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line) for line in entries]
    assert all(matches), [line for line, match in zip(entries, matches, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


def direct_requirements() -> list[Requirement]:
    """Every requirement that pyproject.toml states: build backend, dependencies, extras."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = stated["project"]["optional-dependencies"].values()
    lines = [*stated["build-system"]["requires"], *stated["project"]["dependencies"]]
    return [Requirement(line) for line in [*lines, *(line for extra in extras for line in extra)]]


def all_requirements() -> Iterator[Requirement]:
    """The direct requirements and, as far as they are installed here, what those bring."""
    waiting, seen = direct_requirements(), set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        yield requirement
        try:
            lines = requires(requirement.name) or []
        except PackageNotFoundError:  # the tensorboard extra is not set up by default
            continue
        brought = [Requirement(line) for line in lines]
        waiting += [new for new in brought if applies(new, requirement.extras)]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether the requirement holds on this machine, with these extras of its parent."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])


def test_every_direct_and_indirect_dependency_is_pinned_to_a_version_that_it_accepts() -> None:
    pinned = pins()
    problems = [
        f"{requirement} (pinned: {pinned.get(canonicalize_name(requirement.name))})"
        for requirement in all_requirements()
        if not requirement.specifier.contains(
            pinned.get(canonicalize_name(requirement.name), "0"), prereleases=True
        )
        or canonicalize_name(requirement.name) not in pinned
    ]
    assert problems == []


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_compromised_releases_of_lightning_are_excluded(version: str) -> None:
    (lightning,) = (entry for entry in direct_requirements() if entry.name == "lightning")
    assert not lightning.specifier.contains(version)
