"""Places that hold a function of an object for a while: found, filled, and put back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ditloom.contracts.errors import UserError

Place = tuple[MutableMapping[str, Any], str]
Function = Callable[..., Any]


@contextmanager
def attribute(owner: Any, name: str, wrap: Callable[[Function], Function]) -> Iterator[None]:
    """`owner.name` wrapped on this object alone, for the length of a `with` block."""
    held, present = vars(owner), name in vars(owner)
    before = getattr(owner, name)
    mine = wrap(before)
    held[name] = mine
    try:
        yield
    finally:
        if held.get(name) is mine:
            if present:
                held[name] = before
            else:
                del held[name]


@contextmanager
def innermost(module: nn.Module, mine: Function) -> Iterator[Function]:
    """The innermost forward of a module replaced by `mine`; yields the original.

    Hooks of accelerate and diffusers wrap a forward from outside: theirs go on working around the one inside.
    """
    original = type(module).forward.__get__(module)
    place = _find(module)
    present = place[1] in place[0]
    place[0][place[1]] = mine
    try:
        yield original
    finally:
        _put_back(module, mine, original, place if not present else None)


def is_wrapped(module: nn.Module) -> bool:
    """Whether anything acts around a module's forward, so that it must be called to be run."""
    registry = vars(module).get("_diffusers_hook")
    fired = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(fired or (registry is not None and registry._fn_refs))


def _find(module: nn.Module) -> Place:
    """The place of the plain forward of a module's class; the module itself where nothing wraps it."""
    for held, name in _places(module):
        if _is_plain(held[name], module):
            return held, name
    if "forward" in vars(module):
        raise UserError(
            f"the forward of this {type(module).__name__} was replaced by something that neither accelerate nor "
            "diffusers did; methods cannot find the original inside it"
        )
    return vars(module), "forward"


def _places(module: nn.Module) -> Iterator[Place]:
    """Wherever a forward may be held, wrapped or plain."""
    held = vars(module)
    yield from ((held, name) for name in ("forward", "_old_forward") if name in held)
    registry = held.get("_diffusers_hook")
    for reference in registry._fn_refs if registry is not None else ():
        yield from ((vars(reference), name) for name in ("original_forward", "forward"))


def _is_plain(function: Any, module: nn.Module) -> bool:
    return getattr(function, "__self__", None) is module and getattr(function, "__func__", None) is type(module).forward


def _put_back(module: nn.Module, mine: Function, original: Function, added: Place | None) -> None:
    """Wherever `mine` is by now: hooks may have been added around it meanwhile."""
    for held, name in _places(module):
        if held[name] is mine:
            if added is not None and held is vars(module) and name == "forward":
                del held[name]
                return
            held[name] = original
