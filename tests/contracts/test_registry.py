"""Names to implementations: files, the running program, and installed packages that bring methods of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ditloom.contracts import registries
from ditloom.contracts.errors import UnknownName
from ditloom.contracts.registries import METHODS, SAMPLERS
from ditloom.contracts.registry import Registry, register

PLUGIN = '''
"""A method from elsewhere."""
from dataclasses import dataclass
from ditloom.contracts.method import Handler, Method, Touch
from ditloom.contracts.registry import register

class Nothing(Handler):
    key = "from-elsewhere"

@register("from-elsewhere", paper="Elsewhere 2026", family="caches")
@dataclass(frozen=True, kw_only=True)
class FromElsewhere(Method):
    """Does nothing, from another package."""
    strength: float = 0.5

    @classmethod
    def touches(cls):
        return (Touch("output", "around"),)

    def bind(self, surface, assets=None):
        return Nothing()
'''


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A package with an entry point, as an installer would leave it on the path."""
    (tmp_path / "elsewhere.py").write_text(PLUGIN)
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ditloom.methods]\nfrom-elsewhere = elsewhere:FromElsewhere\n")
    return tmp_path


def test_an_installed_package_adds_a_method(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    assert "from-elsewhere" in METHODS.names()
    assert METHODS.info("from-elsewhere").paper == "Elsewhere 2026"
    from ditloom.contracts.settings import registered

    assert registered(METHODS, "from-elsewhere:strength=0.25").strength == 0.25
    with pytest.raises(UnknownName, match="'from-elsewhere'"):
        METHODS.get("from-elsewher")


def test_it_runs_from_the_command_line(installed: Path) -> None:
    code = "import sys; from ditloom.cli import main; sys.exit(main(['methods', 'from-elsewhere', '--json']))"
    env = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    assert '"strength"' in ran.stdout and "Elsewhere 2026" in ran.stdout


@pytest.mark.parametrize(
    "registry", [r for r in vars(registries).values() if isinstance(r, Registry)], ids=lambda r: r.kind
)
def test_every_listed_name_loads_and_says_its_name(registry: Registry) -> None:
    for name in registry.names():
        assert registry.info(name).name == name and registry.info(name).target is registry.get(name)
        assert (registry.get(name).__doc__ or "").strip(), f"{registry.kind} {name} explains itself"


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ditloom.contracts import registries as r; "
        "[x.names() for x in vars(r).values() if isinstance(x, r.Registry)]; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_name_of_the_running_program() -> None:
    @register("only-here")
    class Here:
        """Local."""

    registry = Registry("sampler", "ditloom.samplers")
    assert registry.add(Here) is Here and registry.get("only-here") is Here
    assert "only-here" in registry.names() and "only-here" not in SAMPLERS.names()
    with pytest.raises(UnknownName, match="did you mean 'euler'"):
        registry.get("eular")
