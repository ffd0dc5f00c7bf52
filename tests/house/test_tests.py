"""The tests mirror the package, import no other test file, and have short names."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support import ROOT, offenders

TESTS = ROOT / "tests"
PACKAGE = ROOT / "lora_export"
# Folders that test more than one folder of the package, or hold what tests share.
OF_THE_WHOLE = {"benchmarks", "defects", "fuzz", "hostile", "house", "matrix", "mutants", "support"}
MOST_WORDS = 12
FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = [path for path in FILES if path.name.startswith("test_")]


def relative(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def names_of_tests(source: str) -> list[str]:
    """The names of test functions. A regular expression: to parse all tests takes many seconds."""
    return re.findall(r"^[ \t]*(?:async +)?def +(test_\w+)", source, re.MULTILINE)


def too_long(names: list[str]) -> list[str]:
    return [name for name in names if len(name.removeprefix("test_").split("_")) > MOST_WORDS]


def repeated(names: list[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def imported(source: str) -> Iterator[str]:
    """Every part of the names of the modules that a file imports, and the names that it imports from them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            for name in [*names, getattr(node, "module", None) or ""]:
                yield from name.split(".")


def test_names_are_short_and_no_test_file_is_imported() -> None:
    stems, faults = {file.stem for file in TEST_FILES}, {}
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        names = names_of_tests(source) if path in TEST_FILES else []
        named = stems.intersection(re.findall(r"\w+", source))  # most files name no test file, so are not parsed
        faults[relative(path)] = [*too_long(names), *repeated(names), *(named and named & set(imported(source)))]
    assert len(faults) > 300 and offenders(faults) == {}


def test_every_folder_of_tests_is_a_folder_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TEST_FILES}
    assert {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()} <= OF_THE_WHOLE


def test_long_and_repeated_names_and_imports_are_found() -> None:
    long = "test_" + "_".join("abcdefghijklm")
    source = f"def {long}(): ...\ndef helper(): ...\nclass A:\n async def test_b(self): ...\n# no def test_c()"
    assert names_of_tests(source) == [long, "test_b"]
    assert too_long([long, long[:-2]]) == [long] and repeated(["test_a", "test_b", "test_a"]) == ["test_a"]
    source = "from house.test_x import helper\nimport formats.test_peft\nfrom . import test_y"
    assert {"test_x", "test_peft", "test_y"} <= set(imported(source))
