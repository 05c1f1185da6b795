"""Errors a user can cause: one clear sentence each; the command line turns them into exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one sentence for them."""


class UnknownName(UserError):
    """A name that no registry entry, preset, flag or key has; offers the nearest ones."""

    def __init__(self, kind: str, given: str, known: Iterable[str]):
        self.kind, self.given, self.known = kind, given, tuple(known)
        super().__init__(f"unknown {kind} {given!r}: {self._hint()}")

    def _hint(self) -> str:
        by_fold = {name.casefold(): name for name in self.known}
        near = [by_fold[n] for n in get_close_matches(self.given.casefold(), by_fold, n=3, cutoff=0.5)]
        if near:
            return f"did you mean {' or '.join(repr(n) for n in near)}?"
        listed = ", ".join(sorted(self.known)[:20]) or "none is registered"
        return f"known are {listed}"


class MissingExtra(UserError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: install it with  pip install 'ditloom[{extra}]'")
