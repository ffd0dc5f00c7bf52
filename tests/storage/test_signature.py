"""A signature names who made an output; model-signing's own check is the oracle that it is one of its kind."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.errors import Different, EnvironmentLacking, InputRefused
from lora_export.lora import LoraPair
from lora_export.options.verify import Expectations
from lora_export.storage.signature import MOST_BYTES, PASSWORD, refuse_unsigned, signature_of
from support.api import an_adapter, base_weights
from support.cli import call
from support.graphs import an_adapter as graph_adapter
from support.keys import a_key
from support.small_graphs import filled


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        base_weights(tmp_path / name / "model.safetensors")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other" / "model.safetensors")
    an_adapter(tmp_path / "adapter")
    a_key(tmp_path, "own")
    return tmp_path


def signed(place: Path, base: str = "base", key: str = "own.pem", **options: Any) -> Path:
    output = place / ("out" if base == "base" else "out.safetensors")
    le.merge(place / base, place / "adapter", output, sign=key if key == "sigstore" else place / key, **options)
    return output


def test_model_signing_itself_accepts_a_signed_folder(place: Path) -> None:
    from model_signing import verifying  # half a second, which each worker would take to collect this

    own = verifying.Config().use_elliptic_key_verifier(public_key=place / "own.pub")
    own.verify(signed(place), place / "out" / "model.sig")
    (place / "out" / "lora_export.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Hash mismatch for 'lora_export\.json'"):
        own.verify(place / "out", place / "out" / "model.sig")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out: (out / "lora_export.json").write_text("{}"),
            "lora_export.json contains other bytes than were signed",
        ),
        (lambda out: (out / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda out: (out / "new.bin").touch(), "new.bin was added"),
        (lambda out: (out / "model.sig").unlink(), "is not signed: there is no "),
        (lambda out: (out / "model.sig").write_text("{}"), "is not what "),
        (lambda out: a_key(out.parent, "own"), "is signed with another key than "),
    ],
    ids=["record", "weights", "added", "unsigned", "empty", "key"],
)
def test_a_changed_output_is_different(place: Path, change: Any, message: str) -> None:
    refuse_unsigned(signed(place), place / "own.pub")
    change(place / "out")
    with pytest.raises(Different, match=message):
        refuse_unsigned(place / "out", place / "own.pub")


def test_one_changed_byte_of_the_statement_is_different(place: Path) -> None:
    file = signed(place) / "model.sig"
    text = file.read_text()
    where = text.index('"payload"') + 200
    file.write_text(text[:where] + ("B" if text[where] == "A" else "A") + text[where + 1 :])
    with pytest.raises(Different, match=r"its signature was changed$"):
        refuse_unsigned(place / "out", place / "own.pub")


def test_the_signature_of_another_file_is_different(place: Path) -> None:
    base_weights(place / "base.safetensors")
    output = signed(place, "base.safetensors")
    refuse_unsigned(output, place / "own.pub")
    shutil.copy(output, place / "copy.safetensors")
    shutil.copy(signature_of(output), place / "copy.safetensors.sig")
    with pytest.raises(Different, match=r"is the signature of other files than copy\.safetensors"):
        refuse_unsigned(place / "copy.safetensors", place / "own.pub")


@pytest.mark.parametrize("overwrite", [False, True])
def test_weights_that_a_graph_shares_are_signed_with_it(tmp_path: Path, overwrite: bool) -> None:
    up = np.random.default_rng(1).standard_normal((9, 9)).astype(np.float32)
    model = filled(
        """g (float[N,9] x) => (float[N,900] y) <float[1,1] up.weight = {0}, float[1,1] large = {0}>
        { h = MatMul(x, up.weight) y = MatMul(h, large) }""",
        **{"up.weight": up, "large": np.ones((9, 900), np.float32)},
    )
    ir.save(model, tmp_path / "base.onnx", external_data="w.data", size_threshold_bytes=1000)
    data, output = tmp_path / "w.data", tmp_path / "out.onnx"
    before = data.read_bytes(), data.stat().st_ino
    pair = LoraPair(a=np.ones((1, 9)), b=np.ones((9, 1)), scale=1.0)
    own: dict[str, Any] = {"share_with": tmp_path / "base.onnx", "sign": a_key(tmp_path, "own"), "overwrite": overwrite}
    le.merge(tmp_path / "base.onnx", graph_adapter({"up": pair}), output, **own)
    assert (data.read_bytes(), data.stat().st_ino) == before and output.stat().st_size < 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("base.onnx", "out.onnx", "out.onnx.sig", "own.pem", "own.pub", "w.data")
    ]
    refuse_unsigned(output, tmp_path / "own.pub")
    data.write_bytes(before[0][:-1] + b"!")
    with pytest.raises(Different, match=r"w\.data contains other bytes"):
        refuse_unsigned(output, tmp_path / "own.pub")


def two_files(folder: Path) -> Path:
    """A graph of two weights, each in a file of its own."""
    model = filled(
        """g (float[N,9] x) => (float[N,900] y, float[N,900] z) <float[1,1] used = {0}, float[1,1] unused = {0}>
        { y = MatMul(x, used) z = MatMul(x, unused) }""",
        used=np.ones((9, 900), np.float32),
        unused=np.zeros((9, 900), np.float32),
    )
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        (folder / "sub").mkdir(exist_ok=True)
        (folder / f"sub/{name}.data").write_bytes(value.const_value.tobytes())
        value.const_value = ir.ExternalTensor(
            f"sub/{name}.data", 0, 9 * 900 * 4, ir.DataType.FLOAT, shape=ir.Shape((9, 900)), name=name, base_dir=folder
        )
    ir.save(model, folder / "shared.onnx")
    return folder / "shared.onnx"


def test_a_file_that_a_graph_does_not_use_is_not_signed(tmp_path: Path) -> None:
    shared, output = two_files(tmp_path), tmp_path / "out.onnx"
    body = """g (float[N,9] x) => (float[N,900] y) <float[1,1] up.weight = {0}, float[1,1] large = {0}>
        { h = MatMul(x, up.weight) y = MatMul(h, large) }"""
    model = filled(body, **{"up.weight": np.eye(9, dtype=np.float32), "large": np.ones((9, 900), np.float32)})
    ir.save(model, tmp_path / "base.onnx")
    adapter = graph_adapter({"up": LoraPair(a=np.ones((1, 9)), b=np.ones((9, 1)), scale=1.0)})
    le.merge(tmp_path / "base.onnx", adapter, output, share_with=shared, sign=a_key(tmp_path, "own"))
    assert output.stat().st_size < 4000
    (tmp_path / "sub/unused.data").unlink()
    refuse_unsigned(output, tmp_path / "own.pub")
    (tmp_path / "sub/used.data").write_bytes(b"!" * 9 * 900 * 4)
    with pytest.raises(Different, match=r"used\.data contains other bytes"):
        refuse_unsigned(output, tmp_path / "own.pub")


def test_a_folder_has_the_signature_of_its_one_file(place: Path) -> None:
    base_weights(place / "base.safetensors")
    served = place / "served"
    le.merge(place / "base.safetensors", place / "adapter", served / "m.safetensors", sign=place / "own.pem")
    refuse_unsigned(served, place / "own.pub")
    (served / "new.bin").touch()
    refuse_unsigned(served / "m.safetensors", place / "own.pub")
    with pytest.raises(Different, match=r"new\.bin was added"):
        refuse_unsigned(served, place / "own.pub")


def test_an_endless_signature_is_refused(place: Path) -> None:
    with (signed(place) / "model.sig").open("r+b") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(InputRefused, match="larger than any signature"):
        refuse_unsigned(place / "out", place / "own.pub")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nowhere.pem", "No such file or directory"),
        ("own.pub", "Name a PEM file with a key on the curve"),
        ("sealed.pem", f"Its password is taken from {PASSWORD}"),
        ("curve.pem", "Unsupported key for curve 'secp256k1'"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_and_nothing_written(place: Path, key: str, message: str) -> None:
    a_key(place, "sealed", b"word")
    a_key(place, "curve", curve=ec.SECP256K1)
    before = sorted(place.iterdir())
    with pytest.raises(InputRefused, match=message):
        signed(place, key=key)
    assert sorted(place.iterdir()) == before


def test_a_key_with_a_password_signs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_key(place, "sealed", b"word")
    monkeypatch.setenv(PASSWORD, "word")
    refuse_unsigned(signed(place, key="sealed.pem"), place / "sealed.pub")
    monkeypatch.setenv(PASSWORD, "other")
    with pytest.raises(InputRefused, match=r"sealed\.pem"):
        signed(place, key="sealed.pem", overwrite=True)


def test_a_missing_package_and_missing_servers_are_environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigstore.models.ClientTrustConfig.production", _no_network)
    with pytest.raises(EnvironmentLacking, match="sigstore could not be used: no route"):
        signed(place, key="sigstore")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(EnvironmentLacking, match=r"needs model-signing .*pip install"):
        signed(place)
    assert not (place / "out").exists()


def _no_network() -> Any:
    raise OSError("no route")


def test_a_signed_output_is_replaced_and_its_signature_copied_nowhere(place: Path) -> None:
    signed(place)
    signed(place, overwrite=True)
    an_adapter(place / "second", scale=2.0)
    le.merge(place / "out", place / "second", place / "next")
    assert (place / "out" / "model.sig").is_file() and not (place / "next" / "model.sig").exists()
    assert le.verify(place / "next", base=place / "out", adapters=place / "second", strict=True)
    le.merge(place / "out", place / "second", place / "both", sign=place / "own.pem")
    of_both = Expectations(signature=place / "own.pub")  # the first adapter is a part of the base
    assert le.verify(place / "both", base=place / "out", adapters=place / "second", expected=of_both)


def test_the_commands_hold_a_gate_to_the_signature(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("merge", place / "base", place / "adapter", "-o", place / "out", "--sign", place / "own.pem") == 0
    judged = ("verify", place / "out", "-a", place / "adapter", "--signature", place / "own.pub", "--base")
    assert call(*judged, place / "base") == 0
    assert "is signed by" in capsys.readouterr().err
    assert call(*judged, place / "other") == 4
    assert "the SHA-256 of the base is" in capsys.readouterr().err
    a_key(place, "own")
    assert call("inspect", place / "out", "--signature", place / "own.pub") == 4


def test_another_adapter_than_the_record_has_is_different(place: Path) -> None:
    an_adapter(place / "second", scale=2.0)
    signed(place)
    with pytest.raises(Different, match="the SHA-256 of the adapters is"):
        le.verify(
            place / "out",
            base=place / "base",
            adapters=place / "second",
            expected=Expectations(signature=place / "own.pub"),
        )
