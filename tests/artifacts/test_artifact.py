"""What a path is, and the record in what lora-export writes, read again from each kind of output."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

import lora_export as le
from lora_export.artifacts import artifact
from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.files import GRAPH_FILES
from lora_export.artifacts.kind import artifact_kind, refuse_no_model
from lora_export.errors import InputRefused
from lora_export.provenance import ROW_ADAPTERS_KEY
from lora_export.storage.artifact_kinds import ArtifactKind
from support.api import MODEL, an_adapter, base_weights
from support.handmade import graph_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    an_adapter(folder / "fr")
    (folder / "base").mkdir()
    base_weights(folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text("{}")
    return folder


def test_every_output_has_its_record(place: Path) -> None:
    adapter = place / "fr"
    le.merge(place / "base", adapter, place / "merged")
    le.merge(place / "base" / "model.safetensors", adapter, place / "m.safetensors", weights=[0.5])
    le.export_torchscript(MODEL, place / "m.pt", adapters=adapter, verify=False)
    for mode in ("merged", "nodes", "inputs", "rows"):
        le.export_onnx(MODEL, place / f"{mode}.onnx", adapters=adapter, lora=mode, verify=False)
        found = open_artifact(place / f"{mode}.onnx").record
        assert found and found.mode == mode and found.by_row == (["fr"] if mode == "rows" else None)
        assert found.content["verdict"] == {"outcome": "not verified", "why": "--no-verify"}
    for name, weight in (("merged", 1.0), ("m.safetensors", 0.5), ("m.pt", 1.0), ("nodes.onnx", 1.0)):
        (recorded,) = open_artifact(place / name).record.adapters
        assert (recorded["name"], recorded["weight"]) == ("fr", weight) and len(recorded["sha256"]) == 64
        assert open_artifact(place / name).record.base


def test_what_others_wrote_has_no_record(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"x")
    graph_file(tmp_path / "m.onnx", {"up.weight": np.eye(4, dtype=np.float32)})
    for path in (place / "base", place / "base" / "model.safetensors", tmp_path / "m.onnx", tmp_path / "model.pt2"):
        assert not open_artifact(path).record


@pytest.mark.parametrize(("names", "expected"), [(["a", "b"], ["a", "b"]), (5, None), ("abc", None), ([1], None)])
def test_rows_choose_from_a_list_of_names(names: object, expected: object, tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Neg (x) }'
    graph = onnx.parser.parse_model(text)
    graph.metadata_props.add(key=ROW_ADAPTERS_KEY, value=json.dumps({"adapters": names}))
    onnx.save(graph, tmp_path / "m.onnx")
    assert open_artifact(tmp_path / "m.onnx").record.by_row == expected


def test_an_enormous_or_damaged_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/extra/lora_export.json", '{"adapters": 1}')
    with pytest.raises(InputRefused, match="damaged"):
        _ = open_artifact(tmp_path / "m.pt").record
    monkeypatch.setattr(artifact, "MAX_RECORD", 3)
    with pytest.raises(InputRefused, match=r"lora_export\.json has more than 3 bytes"):
        _ = open_artifact(tmp_path / "m.pt").record


@pytest.mark.parametrize("name", ["m.pt", "m.pt2", "m.pte"])
@pytest.mark.parametrize(("place", "message"), [(b"PK\x01\x02", "has a damaged archive"), (b'{"a"', "is damaged")])
def test_a_damaged_archive_is_refused(name: str, place: bytes, message: str, tmp_path: Path) -> None:
    """Its directory, or its record: zipfile finds both."""
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("m/extra/lora_export.json", '{"a": 1}')
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content.replace(place, b"1234"))
    with pytest.raises(InputRefused, match=message):
        _ = open_artifact(tmp_path / name).record


# --- artifact ---


def is_refused(source: str | Path) -> bool:
    try:
        refuse_no_model(source)
    except InputRefused:
        return True
    return False


def test_folders_factories_and_programs_name_models(tmp_path: Path) -> None:
    sources = (tmp_path, "m.pt2", "package.module:factory", "f.py:make", tmp_path / "no folder")
    assert list(map(is_refused, sources)) == [False, False, False, False, True]


def test_a_gguf_file_is_a_model_of_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputRefused, match=r"m\.gguf is a GGUF file, which PyTorch does not run"):
        refuse_no_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "source", ["nothing", "nothing/", "m.py:", ":make", "m.safetensors", "m.onnx", "https://host/v1"]
)
def test_anything_else_names_none(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputRefused, match=rf"'{source}' is no model: give a Hugging Face folder that exists, .* or `file\.py:factory`"
    ):
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
