"""Files that try to hurt: their payload does not run, what they point at is not read, and they cost little to refuse.

What is told about damage is tested beside each reader; here whole commands run, with little memory and
time. A hard link into a folder is followed: its content is an ordinary file's, and nothing tells it from
the other name. Code that lies in a base's folder (`*.py`) is copied like its other files and never run:
the merged model is trusted exactly as far as its base was.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fuzz.targets import bounded, run
from lora_export.errors import InputRefused, LoraExportError
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage import npz
from lora_export.training.records.opening import read_labelled_arrays
from support.folder_contents import folder_contents
from support.handmade import Payload, base_file, peft_adapter, raw_tensor_file

W = np.arange(6).reshape(2, 3)
A, B = [[1, 2, 3]], [[1], [10]]
MERGED = [[1.0, 3.0, 5.0], [13.0, 24.0, 35.0]]
SECRET = "the secret of somebody else"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and an adapter that fit, and a secret beside them."""
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"fc.weight": W, "norm.weight": [1, 1]})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    peft_adapter(tmp_path / "adapter", {"fc": (A, B)})
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path


def merge(place: Path) -> tuple[int, str, str]:
    return run("merge", place / "base", place / "adapter", "-o", place / "out")


def refused(place: Path) -> str:
    """Why a merge was refused; it left everything as it was."""
    before = sorted(place.rglob("*"))
    code, said, told = merge(place)
    assert (code, said) == (3, ""), told
    assert SECRET not in told
    assert sorted(place.rglob("*")) == before
    return told


def merged(place: Path) -> dict[str, bytes]:
    """What a merge that succeeded wrote."""
    code, _, told = merge(place)
    assert code == 0, told
    assert load_file(place / "out/model.safetensors")["fc.weight"].tolist() == MERGED
    return folder_contents(place / "out")


# --- pickles and code ------------------------------------------------------------------------------


def pickled(place: Path) -> bytes:
    return pickle.dumps(Payload(place / "payload-ran"))


def no_payload(place: Path) -> bool:
    return not (place / "payload-ran").exists()


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("name", "instead_of"),
    [
        ("adapter/adapter_model.bin", "adapter/adapter_model.safetensors"),
        ("adapter/adapter_model.safetensors", "adapter/adapter_model.safetensors"),
        ("adapter/adapter_config.json", "adapter/adapter_config.json"),
        ("base/pytorch_model.bin", "base/model.safetensors"),
        ("base/model.pth", "base/model.safetensors"),
        ("base/model.safetensors", "base/model.safetensors"),
        ("base/config.json", "base/config.json"),
        ("base/lora_export.json", ""),
        ("base/model.safetensors.index.json", ""),
    ],
)
def test_a_pickle_is_refused_whatever_it_is_called(place: Path, name: str, instead_of: str) -> None:
    if instead_of:
        (place / instead_of).unlink()
    (place / name).write_bytes(pickled(place))
    assert (place / name).parent.name in refused(place)
    assert no_payload(place)


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.onnx"])
@pytest.mark.parametrize("zipped", [False, True])
def test_inspecting_a_pickle_does_not_run_it(place: Path, name: str, zipped: bool) -> None:
    (place / name).write_bytes(pickled(place))
    if zipped:  # as torch.save writes it
        with zipfile.ZipFile(place / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickled(place))
    code, _, told = run("inspect", place / name)
    assert (code, no_payload(place)) == (3, True), told


@pytest.mark.fault(25)
@pytest.mark.parametrize("zipped", [False, True])
def test_verifying_a_pickle_does_not_run_it(tmp_path: Path, zipped: bool) -> None:
    (tmp_path / "model.pt").write_bytes(pickled(tmp_path))
    if zipped:
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickled(tmp_path))
            archive.writestr("archive/constants.pkl", pickled(tmp_path))
            archive.writestr("archive/version", "3")
    with pytest.raises(LoraExportError, match=r"model\.pt"):
        ScriptRunner(tmp_path / "model.pt", ("x",))
    assert no_payload(tmp_path)


@pytest.mark.fault(25)
def test_arrays_of_objects_are_pickles_and_are_not_read(tmp_path: Path) -> None:
    objects = np.array([Payload(tmp_path / "payload-ran")], dtype=object)
    np.savez(tmp_path / "a.npz", x=objects, labels=np.int64([0]))
    (tmp_path / "b.npz").write_bytes(pickled(tmp_path))
    for name in ("a.npz", "b.npz"):
        for read in (read_labelled_arrays, npz.read_arrays):
            with pytest.raises(InputRefused, match=rf"{name} is not an \.npz file of plain arrays"):
                read(tmp_path / name)
    assert no_payload(tmp_path)


def planted(place: Path) -> str:
    """Code in the base's folder, named in every way in which transformers may be told of it."""
    code = f"open({str(place / 'payload-ran')!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py"):
        (place / "base" / name).write_text(code)
    return code


AUTO_MAP = {
    "AutoConfig": "configuration_evil.C",
    "AutoModel": "modeling_evil.M",
    "AutoTokenizer": ["tokenization_evil.T"],
}
KERNEL = "evil/kernel:f"  # on a hub
EVIL_CONFIG = {
    "model_type": "llama",
    "auto_map": AUTO_MAP,
    "_attn_implementation": KERNEL,
    "_attn_implementation_internal": KERNEL,
}


@pytest.mark.fault(26)
def test_code_in_a_bases_folder_is_copied_and_not_run(place: Path) -> None:
    code = planted(place)
    (place / "base/config.json").write_text(json.dumps(EVIL_CONFIG))
    fields = json.loads((place / "adapter/adapter_config.json").read_text())
    fields["auto_mapping"] = {"base_model_class": "M", "parent_library": "modeling_evil"}
    (place / "adapter/adapter_config.json").write_text(json.dumps(fields))
    (place / "adapter/modeling_evil.py").write_text(code + "# the adapter's")
    written = merged(place)
    assert written["modeling_evil.py"].decode() == code
    assert no_payload(place)


# --- links -----------------------------------------------------------------------------------------


def test_a_link_that_leads_out_of_the_base_is_not_copied_from(place: Path) -> None:
    (place / "base/tokenizer.json").symlink_to("../secret")
    assert "tokenizer.json is a link to" in refused(place)
    (place / "base/tokenizer.json").unlink()
    (place / "base/sub").mkdir()
    (place / "base/sub/notes.txt").symlink_to(place / "secret")
    assert "sub/notes.txt is a link to" in refused(place)


def test_links_within_the_base_and_into_a_caches_blobs_are_followed(place: Path) -> None:
    blobs, snapshot = place / "models--a--b/blobs", place / "models--a--b/snapshots/0123"
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.move(place / "base" / name, blobs / f"{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (blobs / "2").write_text("words")
    (snapshot / "sub/vocab.txt").symlink_to("../../../blobs/2")
    (snapshot / "plain.txt").write_text("plain")
    (snapshot / "again.txt").symlink_to("plain.txt")
    (place / "base").rmdir()
    (place / "base").symlink_to(snapshot)
    written = merged(place)
    assert (written["sub/vocab.txt"], written["again.txt"]) == (b"words", b"plain")
    assert not any(path.is_symlink() for path in (place / "out").rglob("*"))


def test_weights_may_be_links_to_anywhere_since_only_tensors_get_out(place: Path) -> None:
    (place / "elsewhere").mkdir()
    shutil.move(place / "base/model.safetensors", place / "elsewhere/w")
    (place / "base/model.safetensors").symlink_to(place / "elsewhere/w")
    merged(place)


@pytest.mark.parametrize("name", ["base/model.safetensors", "base/config.json", "adapter/adapter_config.json"])
def test_what_is_read_through_a_link_is_not_quoted(place: Path, name: str) -> None:
    (place / name).unlink()
    (place / name).symlink_to(place / "secret")
    assert Path(name).name in refused(place)  # which looks for the secret, too


def test_folders_behind_links_are_not_entered(place: Path) -> None:
    (place / "elsewhere").mkdir()
    shutil.move(place / "secret", place / "elsewhere/secret")
    (place / "base/sub").symlink_to(place / "elsewhere")
    assert not [name for name in merged(place) if "secret" in name or name.startswith("sub")]


def test_a_hard_link_is_a_file(place: Path) -> None:
    (place / "base/notes.txt").hardlink_to(place / "secret")
    assert merged(place)["notes.txt"].decode() == SECRET


@pytest.mark.fault(41)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_what_is_no_file_is_no_companion(place: Path, kind: str) -> None:
    irregular(place / "base/tokenizer.json", kind)
    assert "tokenizer.json" not in merged(place)


def irregular(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


# --- bombs -----------------------------------------------------------------------------------------


def entry(shape: list[int], start: int = 0, stop: int = 0) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


HUNDRED_MB = 100_000_000 - 2
BASE, ADAPTER = "base/model.safetensors", "adapter/adapter_model.safetensors"
LARGE = [  # in one of the two, which have the same reader. Made by the test: 400 MB stay in no worker
    (BASE, lambda: b" " * HUNDRED_MB, None, "is not JSON"),
    (ADAPTER, lambda: b"[" * HUNDRED_MB, None, "values and lists"),
    (BASE, lambda: b'{"a":' * (HUNDRED_MB // 5), None, "is not JSON"),
    (ADAPTER, lambda: b'{"a":' + b"1" * (HUNDRED_MB - 5), None, "is not JSON"),
    (BASE, lambda: b"{" + b",".join(b'"%d":{}' % each for each in range(1_000_000)) + b"}", None, "250,000 objects"),
]


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("name", "header", "length", "message"),
    [
        *LARGE,
        *(
            (name, *row)
            for name in (BASE, ADAPTER)
            for row in (
                (b"{}", 1 << 63, "is not a safetensors file"),
                (b"{}", (1 << 64) - 1, "is not a safetensors file"),
                (b"{}", HUNDRED_MB, "is not a safetensors file"),
                (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", None, "deep"),
                ({"x": entry([1 << 32, 1 << 32])}, None, "needs"),
                ({"x": entry([1 << 63, 1 << 63, 4])}, None, "needs"),
                ({"x": entry([1 << 62], 0, 1 << 64)}, None, "cut short"),
            )
        ),
    ],
)
def test_a_header_that_wants_to_be_large_is_refused_at_little_cost(
    place: Path, name: str, header: Any, length: int | None, message: str
) -> None:
    raw_tensor_file(place / name, header() if callable(header) else header, length=length)
    told = refused(place)
    assert message in told and len(told) < 2000


def test_a_million_empty_tensors_are_refused_at_little_cost(place: Path) -> None:
    one = json.dumps(entry([0])).encode()
    header = b"{" + b",".join(b'"%d": %b' % (number, one) for number in range(1_000_000)) + b"}"
    raw_tensor_file(place / "base/model.safetensors", header)
    assert "more than 3,000,000 values and lists" in refused(place)


@pytest.mark.fault(22)
def test_a_name_that_stands_twice_among_many_is_found_at_once(place: Path) -> None:
    names = b",".join(b'"%d":1' % number for number in range(250_000))
    (place / "base/config.json").write_bytes(b"{" + names + b',"7":1}')
    assert "names 7 more than once" in refused(place)


@pytest.mark.parametrize("name", ["base/config.json", "base/model.safetensors.index.json", "base/lora_export.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "more than 100 deep"),
        ('{"a": ' * 200 + "1" + "}" * 200, "more than 100 deep"),
        ('{"a": [' + "{}," * 250_000 + "{}]}", "more than 250,000 objects"),
    ],
)
def test_json_that_wants_to_be_large_is_refused_at_little_cost(place: Path, name: str, text: str, message: str) -> None:
    (place / name).write_text(text)
    assert message in refused(place)


@pytest.mark.parametrize("name", ["base/config.json", "adapter/adapter_config.json", "base/lora_export.json"])
def test_a_sparse_file_of_gigabytes_is_not_read_whole(place: Path, name: str) -> None:
    (place / name).touch()
    os.truncate(place / name, 20 << 30)
    assert "has more than 100,000,000 bytes" in refused(place)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "Infinity", "1" + "0" * 400, '"1"', "[1]", "true"])
@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern"])
def test_numbers_beyond_number_are_no_rank_and_no_alpha(place: Path, field: str, value: str) -> None:
    fields = {"peft_type": '"LORA"', "r": "1", "lora_alpha": "1", "target_modules": '["fc"]'}
    fields[field] = f'{{"fc": {value}}}' if field == "rank_pattern" else value
    text = "{" + ", ".join(f'"{name}": {spelled}' for name, spelled in fields.items()) + "}"
    (place / "adapter/adapter_config.json").write_text(text)
    assert f"must be a {'number other than 0' if field == 'lora_alpha' else 'positive number'}" in refused(place)


HOURS = ["(a+)+b", "(a|a)*b", "(a|aa)+b", "a*a*a*a*a*a*a*a*b", "(.*)(.*)(.*)(.*)(.*)(.*)b", "a?" * 40 + "a" * 40]
HOURS += ["(a|a)" * 40 + "b", "((a{1,9}){1,9}){1,9}b", r"(\w+\s?)+!", "[ab]+[ab]+[ab]+[ab]+[ab]+c"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", HOURS)
def test_a_catastrophic_pattern_soon_fails_to_match(place: Path, pattern: str, field: str) -> None:
    peft_adapter(place / "adapter", {"a" * 100: (A, B)}, **{field: {pattern: 1}})
    begun = time.process_time()
    told = refused(place)  # it goes on to lay the adapter against a base of another name
    assert "the base has no weight for aaa" in told or "takes too much work" in told
    assert time.process_time() - begun < 20


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 3000 + ")" * 3000, "(?P<a", "[z-a]"])
def test_a_pattern_that_is_none_is_refused(place: Path, pattern: str) -> None:
    peft_adapter(place / "adapter", {"fc": (A, B)}, alpha_pattern={pattern: 1})
    told = refused(place)
    assert re.search("alpha_pattern.*(is not a regular expression|longer than 1000|repeats too often)", told), told


@pytest.mark.parametrize(
    "pattern",
    [
        *("fc", "f.*", "^fc", r"layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\..*|fc", r".*\.(q|k|v|o)_proj|fc"),
        *(r"(.*\.)?\w+", "(?:fc)"),
    ],
)
def test_patterns_as_trainers_write_them_are_matched(place: Path, pattern: str) -> None:
    peft_adapter(place / "adapter", {"fc": (A, B)}, lora_alpha=7, alpha_pattern={pattern: 1})
    merged(place)


def a_member(shape: tuple[int, ...], content: bytes, *, version: int = 1) -> bytes:
    """An .npy whose header promises this shape of int64, whatever follows."""
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + content


@pytest.mark.slow
def test_an_npz_that_inflates_to_gigabytes_is_refused_at_little_cost(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x.npy", "labels.npy"):
            with archive.open(name, "w") as member:
                member.write(a_member((75_000_000,), b""))
                for _ in range(75):
                    member.write(bytes(8_000_000))
    assert (tmp_path / "bomb.npz").stat().st_size < 2_000_000
    assert "inflates from" in refused_arrays(tmp_path / "bomb.npz")


@pytest.mark.parametrize(
    ("shape", "version"), [((1 << 40,), 1), ((1 << 62, 4), 1), ((1 << 20, 1 << 20, 0), 3), ((2,), 9), ((-1,), 1)]
)
def test_an_npz_that_overstates_its_size_is_refused_cheaply(
    tmp_path: Path, shape: tuple[int, ...], version: int
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("x.npy", a_member(shape, bytes(8), version=version))
    assert "is not an .npz file of plain arrays" in refused_arrays(tmp_path / "bomb.npz")


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", a_member((1000,), bytes(8000)))
    true, lie = struct.pack("<L", 8000 + len(a_member((1000,), b""))), struct.pack("<L", 100)
    (tmp_path / "bomb.npz").write_bytes(file.getvalue().replace(true, lie))
    assert "is not an .npz file of plain arrays" in refused_arrays(tmp_path / "bomb.npz")


def refused_arrays(path: Path) -> str:
    """Why the reader of `--inputs` and `--data` refuses a file, with little memory to do it in."""
    with bounded(), pytest.raises(InputRefused) as refusal:
        npz.read_arrays(path)
    return str(refusal.value)


def test_an_onnx_file_beyond_protobufs_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    os.truncate(tmp_path / "model.onnx", 20 << 30)
    code, _, told = run("inspect", tmp_path / "model.onnx")
    assert (code, "An ONNX graph must have less than" in told) == (3, True), told


# --- the terminal ----------------------------------------------------------------------------------


# --- adapters of other formats ---------------------------------------------------------------------

STATED = ("--allow-pickle", "--lora-rank", "1", "--lora-alpha", "1")
# The file of a format -> the name of a tensor in it, and the options that it needs.
PICKLES = {
    "peft/adapter_model.bin": ("base_model.model.fc.lora_A.weight", STATED[:1]),
    "litgpt/lit_model.pth.lora": ("transformer.h.0.attn.qkv.lora_A", STATED[:1]),
    "torchtune/adapter_model.pt": ("layers.0.attn.q_proj.lora_a.weight", STATED),
    "loralib.pt": ("fc.lora_A", STATED),
}


def merge_file(place: Path, name: str, *options: str) -> tuple[int, str, str]:
    return run("merge", place / "base", place / name, "-o", place / "out", *options)


def pickled_formats(place: Path, **more: Any) -> None:
    """A file of each format, with a tensor and `more`."""
    for name in ("litgpt", "torchtune", "peft"):
        (place / name).mkdir()
    shutil.copy(place / "adapter/adapter_config.json", place / "peft")
    (place / "litgpt/hyperparameters.yaml").write_text("lora_r: 1\nlora_alpha: 1\nlora_query: true\n")
    (place / "litgpt/model_config.yaml").write_text("name: L\nmlp_class_name: LLaMAMLP\nn_head: 1\nn_embd: 2\n")
    for name, (tensor, _) in PICKLES.items():
        torch.save({tensor: torch.ones(1, 3), **more}, place / name)


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", PICKLES)
def test_a_payload_in_an_allowed_pickle_does_not_run(place: Path, name: str) -> None:
    pickled_formats(place, evil=Payload(place / "payload-ran"))
    code, said, told = merge_file(place, name, *PICKLES[name][1])
    assert (code, said, no_payload(place)) == (3, "", True), told
    assert Path(name).name in told and "it is damaged, or it holds more than tensors" in told


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_is_opened_without_the_option(place: Path, name: str) -> None:
    pickled_formats(place, evil=Payload(place / "payload-ran"))
    code, _, told = merge_file(place, name)
    assert (code, no_payload(place)) == (3, True) and "--allow-pickle reads it" in told


@pytest.mark.fault(23)
def test_tensors_larger_than_their_files_take_no_memory(place: Path) -> None:
    huge = torch.ones(1).expand(1 << 40, 1)
    torch.save({"fc.lora_A": huge, "fc.lora_B": huge}, place / "a.pt")
    code, _, told = merge_file(place, "a.pt", *STATED)
    assert code == 3 and "is larger than its data" in told
    with zipfile.ZipFile(place / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(200_000_000))
    code, _, told = merge_file(place, "b.pt", *STATED)
    assert code == 3 and "is not an adapter in a known format" in told


@pytest.mark.fault(41)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder"])
@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "lit_model.pth.lora", "config.json"])
def test_what_is_no_file_is_refused_in_every_format(place: Path, name: str, kind: str) -> None:
    (place / "other").mkdir()
    (place / "other/adapter_config.json").write_text('{"lora_parameters": {"rank": 1, "scale": 1.0}}')
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(1, 1)}, place / "other/adapter_model.pt")
    (place / "other" / name).unlink(missing_ok=True)
    irregular(place / "other" / name, kind)
    code, _, told = merge_file(place, "other", *STATED)
    assert code == 3, told


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf"])
def test_a_conversion_of_a_damaged_adapter_leaves_nothing_behind(place: Path, to: str) -> None:
    (place / "adapter/adapter_model.safetensors").write_bytes(b"\xff" * 100)
    before = sorted(place.rglob("*"))
    code, _, told = run("convert", place / "adapter", "-o", place / "new", "--to", to, "--base", place / "base")
    assert code == 3 and "is not a safetensors file" in told
    assert sorted(place.rglob("*")) == before
