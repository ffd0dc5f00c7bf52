"""Fields of a program's JSON: expressions are not evaluated, malformed JSON is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuzz.targets import run
from lora_export.models.pt2 import program
from support.hostile_programs import changed, refused
from support.programs import ids, padded, rewritten

EXPRESSIONS = [
    "__import__('os').system('touch payload-ran')",
    "Symbol('s0').__class__",
    "Symbol('s0', positive=open('payload-ran', 'w'))",
    "[].__class__.__base__.__subclasses__()",
    "9**9**9**9",
    "Integer(" * 500 + "1" + ")" * 500,
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_size_that_is_an_expression_is_not_evaluated(
    good: Path, tmp_path: Path, expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(graph: dict[str, Any]) -> None:
        for tensor in graph["graph_module"]["graph"]["tensor_values"].values():
            for size in tensor["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = expression

    path = changed(good, tmp_path, change)
    code, _, message = run("verify", path, "--model", path)
    assert code == 3 and "is computed from others" in message
    module = program.load_program(path)  # a candidate runs: the program computes its own sizes, and reads no expression
    assert module(ids=ids(3, 4) % 10, mask=padded(3, 4)).shape == (3, 4)
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{" + b'"a":{' * 50_000, "is not JSON"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "deep"),
        (b'{"a": 1, "a": 2}', "more than once"),
        (b'{"a": [' + b"{}," * 1_000_000 + b"{}]}", "more than 1,000,000 objects"),
        (b"[]", "is not a JSON object"),
        (b"\xff\xfe{}", "is not JSON"),
    ],
)
def test_malformed_or_huge_json_is_refused_quickly(good: Path, tmp_path: Path, text: bytes, problem: str) -> None:
    assert problem in refused(rewritten(good, tmp_path / "evil.pt2", {"models/model.json": text}))
