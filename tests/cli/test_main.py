"""The front door: help, version, mistakes, interruptions, and what it costs to ask."""

import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ditloom import __version__
from ditloom.cli import FOLDER, main
from ditloom.cli.commands import COMMANDS
from ditloom.cli.commands.methods import Methods
from ditloom.cli.flags import parsed
from ditloom.contracts.errors import UserError

NAMES = COMMANDS.names()
HEAVY = ("torch", "numpy", "tyro", "rich", "yaml", "PIL")


def test_every_file_is_a_command_in_the_help(ditloom):
    assert sorted(path.stem for path in FOLDER.glob("[!_]*.py")) == NAMES
    for ended in (ditloom(), ditloom("--help"), ditloom("-h")):
        assert ended.code == 0 and not ended.err
        listed = {line.split()[0]: line for line in ended.out.splitlines() if line.startswith("  ")}
        assert sorted(listed) == NAMES
        assert all(len(line.split()) > 4 for line in listed.values())


def test_version(ditloom):
    assert ditloom("--version").out == f"ditloom {__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_names_every_option(ditloom, name):
    ended = ditloom(name, "--help")
    assert ended.code == 0 and not ended.err
    shown = "".join(ended.out.split())
    for field in fields(COMMANDS.get(name)):
        assert field.name.replace("_", "-") in shown or field.name.upper() in shown or "positional" in shown
    assert "--json" in ended.out


def test_a_mistyped_command_is_answered_by_the_nearest(refused):
    assert refused("genrate").startswith("ditloom: unknown command 'genrate': did you mean 'generate'")
    assert all(name in refused("zzzzzz") for name in NAMES)
    assert "unknown command '--jsno'" in refused("--jsno")


@pytest.mark.parametrize("name", NAMES)
def test_a_mistyped_option_is_answered_by_the_nearest(refused, name):
    assert f"unknown option --jsn of {name}: did you mean --json?" in refused(name, "--jsn")


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (UserError("two\nlines  here"), "two lines here"),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (MemoryError(), "make --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "make --batch-size"),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(refused, monkeypatch, raised, sentence):
    monkeypatch.setattr(Methods, "run", _raising(raised))
    assert sentence in refused("methods")


def test_interruption_and_closed_pipe(ditloom, monkeypatch):
    monkeypatch.setattr(Methods, "run", _raising(KeyboardInterrupt()))
    assert ditloom("methods").code == 130
    monkeypatch.setattr(Methods, "run", _raising(BrokenPipeError()))
    assert ditloom("methods").code == 0


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(Methods, "run", _raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["methods"])


def test_what_a_library_prints_stays_out_of_the_answer(ditloom, monkeypatch):
    listed = Methods.run

    def noisy(self):
        print("a library says hello")
        return listed(self)

    monkeypatch.setattr(Methods, "run", noisy)
    ended = ditloom("methods", "--json")
    assert isinstance(ended.document, list) and "hello" in ended.err


def test_help_and_version_are_quick_and_import_nothing_heavy():
    for argument in ("--help", "--version"):
        script = f"import sys; from ditloom.cli import main; main([{argument!r}]); print(*sys.modules, file=sys.stderr)"
        loaded = _python(script).stderr.split()
        assert not set(HEAVY) & set(loaded)
        assert min(_cpu_seconds(argument) for _ in range(3)) < 0.3


def test_help_of_commands_needs_no_torch():
    calls = "\n".join(f"main([{name!r}, '--help'])" for name in NAMES)
    loaded = _python(f"import sys\nfrom ditloom.cli import main\n{calls}\nprint(*sys.modules, file=sys.stderr)").stderr
    assert "tyro" in loaded.split() and "torch" not in loaded.split()


GUIDE = Path(__file__).parents[2] / "docs" / "how-to-command-line.md"
WRITTEN = [
    line
    for line in re.findall(r"(?:^|`|no-python )(ditloom [a-z][^`\n]*)", GUIDE.read_text(), re.M)
    if " | " not in line
]


@pytest.mark.parametrize("line", sorted(set(WRITTEN)))
def test_the_guide_writes_commands_as_they_are(line):
    name, *arguments = shlex.split(line)[1:]
    assert parsed(COMMANDS.get(name), name, arguments)


def test_the_guide_tells_of_every_command():
    assert {line.split()[1] for line in WRITTEN} == set(NAMES)


def _raising(error):
    def run(self):
        raise error

    return run


def _python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


def _cpu_seconds(argument):
    """Processor time of one call: unlike the time on the wall, it does not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "ditloom.cli", argument], check=True, env=os.environ, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
