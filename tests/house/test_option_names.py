"""Below the command line, messages name options by their Python names: each interface spells them its own way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from lora_export.options.commands import RECORDS
from lora_export.options.declaring import nested_in, options_of
from support import ROOT, offenders

PACKAGE = ROOT / "lora_export"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in ("cli", "options")]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Programs whose own flags a message names
OTHERS = re.compile(r"\bpip (check|install)\b|\bhf download\b|\btorchrun\b|--revision")
# Names that messages use for options of nested records, and for options that only the command line has
BESIDE = {"combine", "combine_seed", "json", "prompt", "image", "audio"}


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The texts of a module, with their lines. Those of one message that is split are joined."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def flags(source: str) -> list[tuple[int, str]]:
    found = texts(ast.parse(source)) if FLAG.search(source) else ()
    return [(line, text) for line, text in found if FLAG.search(text) and not OTHERS.search(text)]


def named_options(source: str) -> set[str]:
    """The names that a module gives to `named`, and as keywords to `command`."""
    if not re.search(r"\b(named|command)\(", source):
        return set()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    by_name = {node.func.id: [] for node in calls if isinstance(node.func, ast.Name)}
    for node in calls:
        if isinstance(node.func, ast.Name):
            by_name[node.func.id].append(node)
    first = [node.args[0] for node in by_name.get("named", ()) if node.args]
    names = {value.value for value in first if isinstance(value, ast.Constant)}
    return names | {keyword.arg for node in by_name.get("command", ()) for keyword in node.keywords if keyword.arg}


def test_no_message_below_the_command_line_has_a_flag() -> None:
    found = {str(path.relative_to(PACKAGE)): flags(path.read_text(encoding="utf-8")) for path in FILES}
    assert len(found) > 300 and offenders(found) == {}


def test_every_option_that_a_message_names_exists() -> None:
    known = {one.name for record in RECORDS.values() for one in options_of(record)} | BESIDE
    for record in RECORDS.values():
        for name, nested in nested_in(record).items():
            prefix = "expect_" if name == "expected" else ""
            known |= {f"{prefix}{one.name}" for one in options_of(nested.record)}
    found = {path: named_options(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    unknown = {str(path.relative_to(PACKAGE)): names - known for path, names in found.items() if names - known}
    assert unknown == {}


def test_flags_and_names_are_found() -> None:
    assert flags('x = f"{a} needs --dtype float32"') == [(1, " needs --dtype float32")]
    assert flags('x = "pip install --upgrade torch"\ny = "a -- b"') == []
    assert named_options("named('dtype', 1); command('onnx', 'G', lora='nodes'); other('x', y=1)") == {"dtype", "lora"}
