"""Text files that the package writes have the same bytes on every system."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from support import ROOT, offenders

MODULES = sorted((ROOT / "lora_export").rglob("*.py"))


def text_writes(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls that write a text file, or open one to write it: `write_text`, `open`, `fdopen`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            is_method = name == "open" and isinstance(node.func, ast.Attribute)  # Path.open(mode)
            if name == "write_text" or (
                name in ("open", "fdopen") and _writes_text(_mode(node, 0 if is_method else 1))
            ):
                yield node


def _mode(call: ast.Call, position: int) -> str:
    by_name = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    (mode,) = [*by_name, *call.args[position : position + 1], ast.Constant("r")][:1]
    return str(mode.value) if isinstance(mode, ast.Constant) else "r"


def _writes_text(mode: str) -> bool:
    return "b" not in mode and bool(set(mode) & set("wax+"))


def depends_on_the_system(call: ast.Call) -> bool:
    """Whether the line ends or the encoding are left to the system."""
    stated = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return stated.get("encoding") != "'utf-8'" or stated.get("newline") != repr("\n")


def test_written_text_does_not_depend_on_the_system() -> None:
    found = {}
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        calls = text_writes(ast.parse(source)) if re.search(r"open\(|write_text", source) else ()
        found[str(path.relative_to(ROOT))] = [call.lineno for call in calls if depends_on_the_system(call)]
    assert len(found) > 300 and offenders(found) == {}


def test_text_writes_are_found() -> None:
    good = "path.write_text(text, encoding='utf-8', newline='\\n')"
    others = (
        "path.open('rb'); path.open(); open(path); open(path, 'wb'); archive.open(name, 'w'); path.write_bytes(b'')"
    )
    assert not any(map(depends_on_the_system, text_writes(ast.parse(f"{good}; {others}"))))
    for bad in (
        "path.write_text(text, encoding='utf-8')",
        "path.write_text(text, newline='\\n')",
        "path.open('a', encoding='utf-8')",
        "open(path, 'w', encoding='utf-8')",
        "open(path, mode='x', encoding='utf-8', newline='')",
        "os.fdopen(descriptor, 'w', encoding='utf-8')",
    ):
        assert [depends_on_the_system(call) for call in text_writes(ast.parse(bad))] == [True], bad
