"""No version with a known way in is installed, or may be.

The registry that tests run against has no advisories by version, so they are kept by hand: each stands in
``pyproject.toml``, above the requirement that leaves its versions out.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
DEPENDENCIES = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
REQUIREMENTS = {each.name: each for each in map(Requirement, DEPENDENCIES)}

#: Of each advisory, the package and the last version that has the fault, or the versions.
ADVISORIES = {
    "GHSA-w37p-236h-pfx3": ("lightning", ["2.6.2", "2.6.3"]),
    "CVE-2025-32434": ("torch", ["2.5.1"]),
    "CVE-2026-24747": ("torch", ["2.9.1"]),
    "CVE-2025-27516": ("jinja2", ["3.1.5"]),
    "CVE-2025-68146": ("filelock", ["3.20.0"]),
    "CVE-2026-22701": ("filelock", ["3.20.2"]),
    "CVE-2023-4863": ("pillow", ["10.0.0"]),
    "CVE-2024-28219": ("pillow", ["10.2.0"]),
}


@pytest.mark.parametrize("advisory", ADVISORIES)
def test_versions_with_an_advisory_are_left_out_with_the_reason_beside_them(advisory: str) -> None:
    package, versions = ADVISORIES[advisory]
    assert not [*REQUIREMENTS[package].specifier.filter(versions)]
    (comment,) = re.findall(rf'((?: *#.*\n)+) *"{package}[^\w-]', PROJECT.read_text())
    assert advisory in comment


@pytest.mark.parametrize("package", REQUIREMENTS)
def test_what_is_installed_is_what_is_required(package: str) -> None:
    assert REQUIREMENTS[package].specifier.contains(version(package), prereleases=True)
