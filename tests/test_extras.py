"""The command that installs what a feature needs."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest

from lora_export import extras
from lora_export.extras import pip_install

REQUIRES = [
    "numpy>=2.0",
    "jinja2>=3.1; extra == 'report'",
    'pillow>=11.0; extra == "data"',
    "pyarrow>=18; extra == 'data'",
    "winonly>=1; sys_platform == 'win32' and extra == 'data'",
]


@pytest.mark.parametrize(
    ("extra", "packages", "command"),
    [
        ("report", (), "pip install 'jinja2>=3.1'"),
        ("data", ("pillow",), "pip install 'pillow>=11.0'"),
        ("data", (), "pip install 'pillow>=11.0' 'pyarrow>=18'"),
        ("tarot", (), "pip install 'lora-export[tarot]'"),
    ],
)
def test_the_packages_of_an_extra_are_named(
    monkeypatch: pytest.MonkeyPatch, extra: str, packages: tuple[str, ...], command: str
) -> None:
    monkeypatch.setattr(
        extras, "installed", lambda: [SimpleNamespace(requires=REQUIRES), SimpleNamespace(requires=None)]
    )
    assert pip_install(extra, *packages) == command


def test_without_metadata_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert pip_install("gguf") == "pip install 'lora-export[gguf]'"


def test_every_extra_that_is_named_exists() -> None:
    import re

    from support import ROOT

    named = {
        extra
        for path in (ROOT / "lora_export").rglob("*.py")
        for extra in re.findall(r"pip_install\(['\"](\w+)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    for extra in named:
        assert "lora-export[" not in pip_install(extra)
