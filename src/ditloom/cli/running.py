"""One command from its arguments to its exit code: what the user can put right is one sentence, never a traceback."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ditloom.cli.command import Answer
from ditloom.cli.commands import COMMANDS
from ditloom.cli.flags import parsed
from ditloom.cli.show import json_text, say, show
from ditloom.contracts.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130
# a function decorated with no_grad is called from torch's wrapper, which then passes for the place of its warning
OURS = r"ditloom\.|torch\.utils\._contextlib$"


def run(name: str, arguments: Sequence[str]) -> int:
    """The exit code of `ditloom name arguments`."""
    try:
        command = parsed(COMMANDS.get(name), name, arguments)
        with spoken_warnings(), contextlib.redirect_stdout(sys.stderr):
            answer = command.run()
        return _print(answer, command.json)
    except SystemExit as ended:
        return int(ended.code or 0)
    except UserError as error:
        return _refused(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return 0
        place = f"{error.filename}: " if error.filename else ""
        return _refused(f"{place}{error.strerror or error}")
    except KeyboardInterrupt:
        say("ditloom: interrupted")
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _refused("the memory does not suffice: make --batch-size, --size or train.micro_batch smaller")


def _print(answer: Answer, as_json: bool) -> int:
    if answer.quiet:
        return 0
    if as_json:
        print(json_text(answer.document))
    else:
        show(answer.shown)
    return 0


def _refused(sentence: str) -> int:
    say(f"ditloom: {' '.join(sentence.split())}")
    return USER_ERROR


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own on accelerators and a plain RuntimeError on the CPU."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "can't allocate memory" in str(error) or "out of memory" in str(error)


@contextlib.contextmanager
def spoken_warnings() -> Iterator[None]:
    """Warnings of this package as a sentence each, said once whatever the numbers in them; others stay unsaid."""
    said: set[str] = set()

    def speak(message: Any, *_: Any, **__: Any) -> None:
        kind = re.sub(r"\d+", "", str(message))
        if kind not in said:
            said.add(kind)
            say(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=OURS)
        warnings.showwarning = speak
        yield
