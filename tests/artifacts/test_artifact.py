"""What a path is: its kind by content and name, and what may name a model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_export.artifacts.artifact import ArtifactKind, artifact_kind, open_artifact, refuse_no_model
from lora_export.artifacts.files import GRAPH_FILES
from lora_export.errors import InputRefused


def is_refused(source: str | Path) -> bool:
    try:
        refuse_no_model(source)
    except InputRefused:
        return True
    return False


def test_folders_factories_and_programs_name_models(tmp_path: Path) -> None:
    sources = (tmp_path, "m.pt2", "package.module:factory", "f.py:make", tmp_path / "no folder")
    assert list(map(is_refused, sources)) == [False, False, False, False, True]


@pytest.mark.parametrize("source", ["nothing", "nothing/", "m.py:", ":make", "m.safetensors", "m.onnx"])
def test_anything_else_names_none(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputRefused, match=r"is no model: give a Hugging Face folder that exists"):
        refuse_no_model(source)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("config.json", "model.safetensors"), ArtifactKind.CHECKPOINT),
        (("config.json", "modules.json"), ArtifactKind.EMBEDDER),
        (("model_index.json",), ArtifactKind.PIPELINE),
        (GRAPH_FILES, ArtifactKind.GENERATION),
        (GRAPH_FILES[:2], ArtifactKind.CHECKPOINT),
        ((), ArtifactKind.CHECKPOINT),
    ],
)
def test_what_a_folder_contains_decides_its_kind(files: tuple[str, ...], kind: ArtifactKind, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert open_artifact(tmp_path).kind is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("m.onnx", ArtifactKind.GRAPH), ("m.safetensors", ArtifactKind.WEIGHTS), ("m.pt2", ArtifactKind.PROGRAM)),
        *((f"m{suffix}", ArtifactKind.SCRIPT) for suffix in (".pt", ".pth", ".ts")),
        *((name, ArtifactKind.OTHER) for name in ("m", "m.txt", "m.ONNX")),
        ("m.onnx_adapter", ArtifactKind.ADAPTER),
    ],
)
def test_a_file_is_what_its_name_claims_whether_or_not_it_exists(name: str, kind: ArtifactKind, tmp_path: Path) -> None:
    assert artifact_kind(tmp_path / name) is kind
    (tmp_path / name).write_bytes(b"words")
    assert artifact_kind(tmp_path / name) is kind
    assert (kind.is_graph, kind.is_checkpoint) == (kind is ArtifactKind.GRAPH, kind is ArtifactKind.WEIGHTS)


@pytest.mark.parametrize(
    ("member", "kind"),
    [
        ("m/archive_format", ArtifactKind.PROGRAM),
        ("m/constants.pkl", ArtifactKind.SCRIPT),
        ("constants.pkl", ArtifactKind.OTHER),
        ("m/data.pkl", ArtifactKind.OTHER),
    ],
)
def test_an_archive_whose_name_claims_nothing_is_what_it_contains(
    member: str, kind: ArtifactKind, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        archive.writestr(member, b"x")
    assert open_artifact(tmp_path / "model.bin").kind is kind
    content = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x03"))  # its directory is damaged
    assert open_artifact(tmp_path / "model.bin").kind is ArtifactKind.OTHER


def test_the_tensors_of_a_checkpoint_are_known_from_its_header(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3), np.float16)}, tmp_path / "m.safetensors")
    found = open_artifact(tmp_path / "m.safetensors").checkpoint.specs
    assert {spec.name: (spec.shape, spec.dtype) for spec in found} == {"a": ((2, 3), "float16")}
