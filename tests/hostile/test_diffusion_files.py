"""Files of diffusion models that were made to do harm: large products of small files, endless names, paths outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fuzz.targets import run
from lora_export import formats
from lora_export.weights.pipeline import open_pipeline
from support.cli import call
from support.folder_contents import folder_contents

SQUARE = np.ones((400, 400), np.float32)
LONG = np.ones((60_000, 1), np.float32)
# Files of a megabyte whose products have 25 to 3,600 million entries.
LARGE = {
    "LoKr": {"lokr_w1": SQUARE, "lokr_w2": SQUARE},
    "LoHa": {"hada_w1_a": LONG, "hada_w1_b": LONG.T, "hada_w2_a": LONG, "hada_w2_b": LONG.T},
    "a LoKr of rank 1": {"lokr_w1": LONG, "lokr_w2": LONG.T},
    "a decomposed LoKr": {"lokr_w1": SQUARE, "lokr_w2_a": LONG, "lokr_w2_b": LONG.T},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file({"a.weight": np.ones((4, 4), np.float32)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def adapter(folder: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    contiguous = {f"diffusion_model.a.{name}": np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, folder / "adapter.safetensors", metadata)
    return folder / "adapter.safetensors"


@pytest.mark.parametrize("name", LARGE)
def test_a_product_of_gigabytes_is_refused_at_little_cost(name, base, tmp_path):
    path = adapter(tmp_path, LARGE[name])
    before = folder_contents(tmp_path)
    assert run("merge", base, path, "-o", tmp_path / "o.safetensors")[0] == 3
    assert folder_contents(tmp_path) == before


@pytest.mark.parametrize(("name", "shape"), [("LoKr", "160000 x 160000"), ("a decomposed LoKr", "24000000 x 24000000")])
def test_the_product_of_a_lokr_is_not_made_to_be_shown(name, shape, tmp_path):
    code, shown, _ = run("inspect", adapter(tmp_path, LARGE[name]))
    assert code == 0 and shape in shown


def test_a_name_of_many_parts_is_read_at_once(base, tmp_path):
    path = adapter(tmp_path, {".".join("a" * 200_000) + ".lora_A.weight": SQUARE, "x.lora_B.weight": SQUARE})
    assert call("merge", base, path, "-o", tmp_path / "o.safetensors") == 3


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"unet.r": NaN}', '{"unet.r": 1e999}', '{"unet": {"r": 1}}', "\x1b[2J", "3"]
)
def test_a_recorded_config_of_any_kind_is_refused_or_unused(text, base, tmp_path, capsys):
    pair = {"lora_A.weight": np.ones((1, 4), np.float32), "lora_B.weight": np.ones((4, 1), np.float32)}
    tensors = {f"unet.a.{name}": value for name, value in pair.items()}
    save_file(tensors, tmp_path / "adapter.safetensors", {"lora_adapter_metadata": text})
    assert call("merge", base, tmp_path / "adapter.safetensors", "-o", tmp_path / "o.safetensors") in (0, 3)
    assert "\x1b" not in "".join(capsys.readouterr())


def test_an_index_names_no_model_outside_of_its_folder(tmp_path):
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    names = ["unet", "..", "../other", "/etc", ".", "", "unet/../.."]
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"] for name in names}))
    assert list(open_pipeline(tmp_path / "pipeline").models) == ["unet"]


def test_every_damage_of_a_file_is_refused(base, tmp_path):
    path = adapter(
        tmp_path, {"lora_down.weight": np.ones((1, 4), np.float32), "lora_up.weight": np.ones((4, 1), np.float32)}
    )
    content = path.read_bytes()
    assert formats.recognised(path)
    for damaged in (content[:-1], content + b"x", content[:9] + b"[" + content[10:], b"", content[:8]):
        path.write_bytes(damaged)
        assert call("merge", base, path, "-o", tmp_path / "o.safetensors") == 3
        assert not (tmp_path / "o.safetensors").exists()
