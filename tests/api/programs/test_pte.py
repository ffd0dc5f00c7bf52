"""What is written for ExecuTorch beside the program, and the sizes for which a program reserves memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lora_export.api.programs.pte import planned_sizes, save_executorch
from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused
from lora_export.models.model import Model
from lora_export.storage.artifact_kinds import ArtifactKind


def test_the_record_is_behind_the_program(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3
    program = SimpleNamespace(write_to_file=lambda file: file.write(content))
    for text in ('{"settings": {"lora": "nodes"}, "longer": "than the next"}', '{"settings": {"lora": "merged"}}'):
        save_executorch(program, tmp_path / "m.pte", extra={"lora_export.json": text})
    artifact = open_artifact(tmp_path / "m.pte")
    assert artifact.kind is ArtifactKind.EXECUTORCH and artifact.record.mode == "merged"
    written = artifact.path.read_bytes()
    assert written.startswith(content + b"PK") and b"longer" not in written
    save_executorch(program, tmp_path / "n.pte", extra={})
    assert not open_artifact(tmp_path / "n.pte").record


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, {"batch": 4, "frames": 300, "sequence": 64}),
        ({"batch": 1, "sequence": 32}, {"batch": 1, "frames": 300, "sequence": 32}),
        ({"batch": 2}, {"batch": 3, "frames": 300, "sequence": 64}),
        ({"sequence": 1000, "frames": 1000}, {"batch": 4, "frames": 1000, "sequence": 64}),
    ],
)
def test_memory_is_planned_for_the_stated_or_usual_sizes(stated: dict[str, int], expected: dict[str, int]) -> None:
    axes, traced = {"x": {0: "batch", 1: "sequence"}, "y": {1: "frames"}}, {"batch": 2, "sequence": 11, "frames": 300}
    unused: Any = None
    model = Model("m", nn.Identity(), axes, unused, traced, limits={"sequence": (0, 64)})
    assert planned_sizes(model, stated) == expected
    with pytest.raises(InputRefused, match=r"max_size=.*length.* has no axis of this name. It has batch, frames, seq"):
        planned_sizes(model, {**stated, "length": 3})
