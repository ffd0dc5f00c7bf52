"""What every HTML report shows: names, files and facts of the run, and numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

Document = Mapping[str, Any]

SHOWN_ELSEWHERE = ("candidate", "model", "adapters", "command", "inputs", "created")


def inline(value: Any) -> str:
    """A fact in one line, of whatever type it is."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inline(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        is_shape = all(isinstance(item, int) for item in value)
        return (" x " if is_shape else ", ").join(map(inline, value))
    return str(value)


def times(factor: float) -> str:
    """`× 1.34`, `× 8,490`."""
    return f"× {factor:.3g}" if factor < 1000 else f"× {float(f'{factor:.3g}'):,.0f}"


def bar_width(used: float) -> float:
    """The width in percent of a bar that is full at the limit, and never invisible."""
    return round(100.0 * min(1.0, max(0.02, used)), 1)


def adapters_of(about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The adapters of the run; empty where `about` does not hold them."""
    listed = about.get("adapters", [])
    return [adapter for adapter in listed if isinstance(adapter, Mapping)] if isinstance(listed, list) else []


def with_adapters(adapters: Sequence[Mapping[str, Any]]) -> str:
    """`its adapter “english”`, `its 3 adapters`; empty without adapters.

    An adapter that is called `adapter`, as its folder often is, is not called by its name.
    """
    names = [str(adapter.get("name", "")) for adapter in adapters]
    named = [f"“{name}”" for name in names if name not in ("", "adapter")]
    if not names:
        return ""
    if len(names) == 1:
        return " ".join(["its adapter", *named])
    if len(named) < len(names):
        return f"its {len(names)} adapters"
    return f"its adapters {', '.join(named[:-1])} and {named[-1]}"


def candidate_name(about: Mapping[str, Any]) -> str:
    """The candidate's file name; empty where `about` does not hold it."""
    candidate = about.get("candidate", "")
    path = candidate.get("path", "") if isinstance(candidate, Mapping) else candidate
    return PurePath(str(path)).name


def files(about: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what it is, name, SHA-256) of everything that was read."""
    rows = []
    if isinstance(candidate := about.get("candidate"), Mapping):
        rows += [("candidate", name, digest) for name, digest in candidate.get("sha256", {}).items()]
    if isinstance(model := about.get("model"), Mapping):
        rows.append(("model's weights", str(model.get("source", "")), str(model.get("sha256", ""))))
    for adapter in adapters_of(about):
        weight = adapter.get("weight", 1)
        what = "adapter" if weight == 1 else f"adapter, × {weight:g}"
        rows.append((what, str(adapter.get("name", "")), str(adapter.get("sha256", ""))))
    return rows


def facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every other fact about the run."""
    return [(name, inline(value)) for name, value in about.items() if name not in SHOWN_ELSEWHERE]
