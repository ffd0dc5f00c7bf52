"""Names from files on every screen: a line break or a control character in one is shown as an escape.

Each command runs on files whose names all contain a forged verdict, commands of GitHub's runner, and characters that
steer a terminal. No line that a command prints may begin with the forged text, or contain one of those characters.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_export.report.github import workflow_command
from support.cli import call
from support.handmade import base_file, peft_adapter

FORGED = "same: error 0 % of the adapter's effect"
EVIL = f"y\n{FORGED}\x1b[2K\u202e##[error]no\u2028::stop-commands::x\r::error::no\n::error::no"
W = np.arange(6, dtype=np.float32).reshape(3, 2)  # (in, out)
FACTORY = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)
        self.fc.weight.data = torch.arange(6.0).reshape(3, 2).T.contiguous()
    def forward(self, x):
        return self.fc(x)
class Named(Model):
    def forward(self, x):
        return {NAME: self.fc(x)}
def plain():
    return Model(), torch.randn(2, 3)
def named():
    return Named(), {"x": torch.randn(2, 3)}
"""


def graph_of(path: Path, *, weight: str = "fc.weight", name: str = "", output: str = "y", record: object = None) -> str:
    """A graph of one MatMul. `name` is part of the names of its input, node and axis."""
    given = f"x{name}"
    node = helper.make_node("MatMul", [given, weight], [output], name=f"n{name}")
    ports = [
        [helper.make_tensor_value_info(port, TensorProto.FLOAT, [f"N{name}", size])]
        for port, size in ((given, 3), (output, 2))
    ]
    graph = helper.make_graph([node], "g", *ports, [numpy_helper.from_array(W, weight)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if record is not None:
        helper.set_model_props(model, {"lora_export": json.dumps(record), EVIL: EVIL})
    onnx.save(model, path)
    return str(path)


RECORD = {
    "adapters": [{"name": EVIL, "sha256": EVIL, "format": EVIL, "weight": 1.0}],
    "base": {EVIL: EVIL},
    "settings": {EVIL: EVIL},
    "verdict": {"outcome": EVIL, "why": EVIL, "against": EVIL, "provider": EVIL},
}
PLAIN_RESIDUAL = {"format": 1, "hashing": "sha256", "is_folder": True, "adapters": [], "settings": {}}
PLAIN_RESIDUAL |= {"shards": {}, "files": {}}
RESIDUALS: list[dict[str, Any]] = [
    {"format": EVIL, "made_by": EVIL},
    {"hashing": EVIL, "shards": {EVIL: {}}},
    {"shards": {EVIL: {}}},
    {"files": {f"../{EVIL}": {}, EVIL: {}}, "settings": {EVIL: EVIL}},
    {"adapters": [{"name": EVIL, "sha256": EVIL, "weight": EVIL}], "settings": {"layout": {EVIL: EVIL}}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("names")
    graph_of(place / "ports.onnx", name=EVIL)
    graph_of(place / "output.onnx", output=EVIL)
    graph_of(place / "weight.onnx", weight=f"fc{EVIL}.weight")
    graph_of(place / "record.onnx", record=RECORD)
    pair = {"fc": ([[1, 2, 3]], [[1], [10]])}
    peft_adapter(place / "adapter", pair)
    peft_adapter(place / "evil", pair, base_model_name_or_path=EVIL, task_type=EVIL, peft_version=EVIL)
    peft_adapter(place / "targets", pair, target_modules=[EVIL])
    peft_adapter(place / "patterns", pair, rank_pattern={EVIL: 3}, alpha_pattern={EVIL: 3})
    configs = {
        "base": {"model_type": EVIL, "architectures": [EVIL], "_name_or_path": EVIL, "auto_map": {EVIL: EVIL}},
        "unknown": {"model_type": EVIL, "architectures": [EVIL]},
        "class": {"model_type": "llama", "architectures": [EVIL]},
        "quantised": {"quantization_config": {"quant_method": EVIL}},
    }
    for folder, config in configs.items():
        (place / folder).mkdir()
        base_file(place / folder / "model.safetensors", {"fc.weight": W.T})
        (place / folder / "config.json").write_text(json.dumps(config))
    (place / "base" / "lora_export.json").write_text(json.dumps({**RECORD, "files": {EVIL: {"sha256": EVIL}}}))
    (place / "indexed").mkdir()
    base_file(place / "indexed" / "a.safetensors", {"fc.weight": W.T})
    table = {"weight_map": {EVIL: "a.safetensors", "fc.weight": "a.safetensors"}}
    (place / "indexed" / "m.safetensors.index.json").write_text(json.dumps(table))
    peft_adapter(place / "other", {"fc": ([[3, 2, 1]], [[1], [1]])}, base_model_name_or_path=EVIL)
    for number, facts in enumerate(RESIDUALS):
        with zipfile.ZipFile(place / f"{number}.residual", "w") as archive:
            archive.writestr("residual.json", json.dumps(PLAIN_RESIDUAL | facts))
    (place / "f.py").write_text(f"NAME = {EVIL!r}{FACTORY}", encoding="utf-8")
    return place


GRAPHS = [f"{name}.onnx" for name in ("ports", "output", "weight", "record")]
BASES = [*GRAPHS, "base", "unknown", "class", "quantised", "indexed"]
ADAPTERS = ["adapter", "evil", "targets", "patterns"]
PROOF = ["--model", "f.py:plain", "-a", "adapter"]
REPORTS = [word for suffix in ("xml", "html", "json") for word in ("--report", f"r.{suffix}")]
COMMANDS = [
    *(["inspect", path, *more] for path in (*BASES, *ADAPTERS) for more in ([], ["--all"], ["--json"], ["--check"])),
    *(["merge", base, "adapter", "-o", "out", *more, "--dry-run"] for base in BASES for more in ([], ["-v"])),
    *(["merge", base, adapter, "-o", "out", "--overwrite"] for base in BASES for adapter in ADAPTERS),
    *(["verify", path, *PROOF, *more] for path in GRAPHS for more in ([], ["-q"], ["-v", *REPORTS], ["--json"])),
    *(["verify", path, "--model", "f.py:named", "-a", "adapter"] for path in GRAPHS),
    *(["verify", path, "--base", "base", "-a", "adapter"] for path in ("base", "unknown", "indexed")),
    *(["verify", "record.onnx", "--model", path] for path in ("base", "unknown", "class", "quantised")),
    *(
        ["onnx", path, "-a", "adapter", "-o", "o.onnx", "--overwrite", *more]
        for path in GRAPHS
        for more in ([], ["-v"])
    ),
    *(["onnx", path, "-a", "adapter", "-o", "o.onnx", "--lora", "rows", "--overwrite"] for path in GRAPHS),
    ["onnx", "f.py:named", "-a", "adapter", "-o", "o.onnx", "--overwrite", "-v"],
    ["torchscript", "f.py:named", "-a", "adapter", "-o", "o.pt", "--overwrite", "-v"],
    *(["onnx", path, "-o", "o.onnx", "--overwrite"] for path in ("base", "unknown", "class")),
    ["convert", "adapter", "-o", "o.onnx_adapter", "--for", "record.onnx"],
    *(["combine", adapter, "other", "-o", "both", "--overwrite"] for adapter in ADAPTERS),
    *(["resize", adapter, "-o", "small", "--rank", "1", "--overwrite"] for adapter in ADAPTERS),
    *(
        ["extract", base, "unknown", "-o", "x", "--rank", "1", "--layout", "*=in_out"]
        for base in ("base", "class", "quantised", "indexed")
    ),
    *(["unmerge", "base", "adapter", "-o", "x", "--base-from", f"{n}.residual"] for n in range(len(RESIDUALS))),
    ["convert", "evil", "-o", "kohya.safetensors", "--to", "kohya"],
]


def is_slow(command: list[str], on_github: bool) -> bool:
    """Whether `make test-slow` runs it: GitHub's screen has all lines of the other one, and -v those of less."""
    is_less = command[0] == "verify" and command[2:] in (PROOF, [*PROOF, "-q"])
    return not on_github or is_less or (command[0] == "onnx" and "-v" in command)


@pytest.mark.parametrize(
    ("command", "on_github"),
    [
        pytest.param(
            one,
            on_github,
            id=f"{' '.join(one)}{' on GitHub' if on_github else ''}",
            marks=pytest.mark.slow if is_slow(one, on_github) else (),
        )
        for one in COMMANDS
        for on_github in (False, True)
    ],
)
def test_no_name_forges_a_line_or_a_command(
    place: Path,
    command: list[str],
    on_github: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    if on_github:
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    capsys.readouterr()
    code = call(*command)
    out, err = capsys.readouterr()
    assert code in (0, 2, 3, 4, 5, 7, 8), err
    for line in lines_of(out, err):
        assert not line.startswith(FORGED) and line.isprintable(), ascii(line)
        assert not (on_github and is_command(line)), line
    if "--json" in command:
        json.loads(out)
    if REPORTS[-1] in command:
        ElementTree.parse("r.xml")
        json.loads(Path("r.json").read_text("utf-8"))
        page = Path("r.html").read_text("utf-8")
        assert "\x1b" not in page and "\u202e" not in page
    if (tmp_path / "summary.md").exists():
        assert not [line for line in lines_of((tmp_path / "summary.md").read_text("utf-8")) if not line.isprintable()]


def lines_of(*texts: str) -> Iterator[str]:
    for text in texts:
        yield from text.split("\n")


def is_command(line: str) -> bool:
    """Whether GitHub's runner would run a line that is no annotation of this program."""
    ours = line.startswith(tuple(f"::{kind} title=" for kind in ("error", "notice")))
    return "##[" in line or (line.lstrip().startswith("::") and not ours)


def test_no_message_ends_its_annotation() -> None:
    line = workflow_command("error", f"verify {EVIL}", f"first {EVIL}")
    assert "\n" not in line and "\r" not in line and line.count("::") >= 2
    assert line.startswith("::error title=")
