"""requirements-lock.txt: the versions and hashes of all that requirements.txt asks for."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKED = (ROOT / "requirements-lock.txt").read_text()


def test_every_requirement_is_locked_at_a_version_that_it_allows():
    versions = dict(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", LOCKED, re.MULTILINE))
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    for requirement in map(Requirement, filter(None, lines)):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: locked at {version}"


def test_every_package_has_a_hash_and_no_address():
    packages = re.split(r"^(?=[\w.-]+(?:\[[^\]]*\])?==)", LOCKED, flags=re.MULTILINE)[1:]
    assert len(packages) > 50 and all("--hash=sha256:" in package for package in packages)
    assert "://" not in LOCKED
