"""Fetching public data with the ordinary package clients, verified by SHA-256 and kept in the user's cache.

No address is written here: `npm` and `apt-get` know their own sources. A file whose checksum differs from the
pinned one is deleted and refused, so what a run trains on is what was measured.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ditloom.contracts.errors import UserError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ditloom`, by default `~/.cache/ditloom`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ditloom"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Tarball:
    """One version of a package on the npm registry: a plain tarball, no node code is run."""

    package: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    def path(self, cache: Path | None = None) -> Path:
        """The verified tarball in the cache, fetched with `npm pack` when absent."""
        target = (cache or cache_folder()) / "npm" / self.file_name
        if not target.exists():
            command = ["npm", "pack", f"{self.package}@{self.version}", "--ignore-scripts"]
            fetch_into(target, command, f"Put the package's tarball at {target} by hand to go without npm.")
        return verified(target, self.sha256)


def fetch_into(target: Path, command: list[str], advice: str) -> Path:
    """Run `command` in an empty folder and move the one file it leaves there to `target`."""
    if shutil.which(command[0]) is None:
        raise UserError(f"`{' '.join(command)}` cannot run: {command[0]} is not installed. {advice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        left = list(Path(folder).iterdir())
        if done.returncode or len(left) != 1:
            reason = (done.stderr.strip() or "it left no file").splitlines()[-1]
            raise UserError(f"`{' '.join(command)}` failed: {reason}. {advice}")
        left[0].replace(target)
    return target


def verified(path: Path, sha256: str) -> Path:
    """`path` if its content has the pinned checksum; otherwise the file is removed and refused."""
    found = sha256_of(path)
    if found != sha256:
        path.unlink()
        raise UserError(f"{path.name} has SHA-256 {found}, expected {sha256}: the file was removed, fetch it again.")
    return path
