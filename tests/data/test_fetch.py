"""Fetching by the package clients: checked, atomic, and clear when it cannot be done."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ditloom.contracts.errors import UserError
from ditloom.data.fetch import Tarball, cache_folder

CONTENT = b"the tarball\n"
PIN = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm that leaves one file and notes its arguments."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nprintf "the tarball\\n" > made.tgz\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin:/bin")
    return tmp_path / "calls"


def test_a_tarball_is_fetched_once(npm: Path) -> None:
    ball = Tarball("@scope/thing", "1.2.3", PIN)
    path = ball.path()
    assert path == cache_folder() / "npm" / "scope-thing-1.2.3.tgz" == ball.path()
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == [path.name]
    assert npm.read_text().splitlines() == ["pack @scope/thing@1.2.3 --ignore-scripts"]


@pytest.mark.usefixtures("npm")
def test_a_wrong_checksum_is_refused_and_removed() -> None:
    ball = Tarball("thing", "1", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        ball.path()
    assert not (cache_folder() / "npm" / ball.file_name).exists()


def test_a_failing_client_is_quoted(npm: Path, tmp_path: Path) -> None:
    (tmp_path / "bin/npm").write_text("#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    with pytest.raises(UserError, match="failed: no network. Put the package's tarball at"):
        Tarball("thing", "1", PIN).path()


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed"):
        Tarball("thing", "1", PIN).path()
