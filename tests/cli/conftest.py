"""Tiny models in folders, and the command line called as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ditloom.cli import main
from tests.cli.tiny import tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny().save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, with a cache of its own and no launcher around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def ditloom(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`ditloom(*arguments)` as the shell would see it."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return call


@pytest.fixture
def refused(ditloom: Callable[..., Ended]) -> Callable[..., str]:
    """The one sentence of a refusal: exit code 2, nothing on the standard output, no traceback."""

    def call(*arguments: object) -> str:
        ended = ditloom(*arguments)
        said = [line for line in ended.err.splitlines() if not line.startswith(("note: ", "generate "))]
        assert (ended.code, ended.out, len(said)) == (2, "", 1), ended
        assert said[0].startswith("ditloom: ")
        return said[0]

    return call
