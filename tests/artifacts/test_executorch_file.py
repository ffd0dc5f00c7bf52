"""The methods of a program that ExecuTorch wrote, and of damaged ones."""

from __future__ import annotations

import base64
import json
import random
import zipfile
import zlib
from pathlib import Path

import pytest

import lora_export as le
from lora_export.artifacts import executorch_file
from lora_export.artifacts.executorch_file import PlannedTensor, read_methods
from lora_export.errors import InputRefused
from support.cli import answer, call

# ExecuTorch 1.5.1 for XNNPACK: nn.Linear(3, 2) on a batch of up to 4, five integers plus 1, and a flag.
PROGRAM = zlib.decompress(base64.b64decode(
    "eNrNVj1oFEEUnt37yeZc5DjPmCLIcVikENnbbPYnSCISwUosLIJRdG9/TPTYHMkGFRVSWlgpiIWVjRZaCJaiVhIUQcQyhaWF2GghSLK+N/v2bnKJ"
    "giaoc7ybn533zffemzczBxljR0409GBG02rQtvsYL0tUK/m0rrIh+B+EusxUpkA7D20cYWwZ5APIlNQVGfqn+CzG4u9JkqP2IZAR3W1Ypm0Y/qgf"
    "moGpG67WhIFRy/BCzzKaZtMxbN0LbbcZ2LZj+m7go9iG5Zimj3yWAVMWMN2Rhmm7YWjpTV13PctuWLrtm4brmk7oOF4YNhuu444YvuPrjms0mpbl"
    "OI6l+bpvhsEoYmprSYJ4MttYcHwGZBKkRv23SZIo4gQqH2F8kNpLue64At5SYSLqvKVFlpj4vcyBFN7eWMCtPAqMDbBhtg94DAkRycMog1GIIUgb"
    "5A5yBaVhEANEBS4HC+vte9GDj2bcBv4q1CqPe1ourSaJRNN2YqyjqO16Fw6DBJHf1T27mvoEddH0ucWY9WN84iAaG3N9n9Ypc6hSh3uJdGZIkKNB"
    "mF9XO36W3idpjApCnIrUR6lBDFNsJiu0TxXCkQUbs5LtoQLxlWgM25gCd8h3K+Qr5D9MOp/WUj8xuQh25DkPScB+uNbhXTiZpLyynEGIz2upTyXB"
    "/8hjEubyOBcGYO4e7i2VdgiyGqDpZcIaIjesAN5ZwQYmde3D+i7FleWKgNTH+eKsJ9l+LVSA3y4eCYU2dYViJayTR34ardPLXYFI9pPPMxsG2O6f"
    "2lAVsYtFvheKP7Ehx7VVtoPwyY+F8jrWec5Xov2k9mSnQvsty7GnII9Bphv7a1fq8eV2UB+r1ZuLs614Nlo4EC+2W0F9f63uzUVxcCnGj9Fiq8WH"
    "ZmZb/nwQnVloBx58mO7o44x1OtlAr8bpa8Kqv6EFP+B8Xtpm3v+93X/qrU195M96cY+J06frv3A4ngfh3PxFd95n21Uk9u/L1FFN28tvtQdy92ZK"
    "C45OHdMaeOfUeN6oDPMtzb0hnsdXQcMGqWa5CvU3IWdX6D7C/j04OzDnEyrZPbc974IS8FL4WVyiszZbZ1BYZ+tvhVLnfCz13CeScI9kBw++jW6A"
    "HKf+deCDU1JOFfBikfuVkWcrhCTT2SveSeJ5vkQ42H/J21LnbpXJdlnQV9hO2MNK9rbYsH6ZbqfN1kesDEcWzmIRr0oWZNZgryxgKQKXvOCn7lug"
    "j2uW6Gquds7x7F2kclzRH9jWtrD3T96sTHwpvhmXo1vPvNfvxisnpOeTjz4//Vu5l1vum7j/6tz4D1eErig="
))  # fmt: skip


def program(path: Path, content: bytes = PROGRAM) -> Path:
    path.write_bytes(content)
    return path


def test_a_program_has_methods_and_their_inputs(tmp_path: Path) -> None:
    (method,) = read_methods(program(tmp_path / "m.pte"))
    numbers, flag = PlannedTensor("int64", (5,)), PlannedTensor("", None)
    assert method.inputs == (PlannedTensor("float32", (4, 3), varies=True), numbers, flag)
    assert method.outputs == (PlannedTensor("float32", (4, 2), varies=True), numbers)
    # Inputs and outputs, each from a multiple of 16 bytes on: 48 + 48 + 32 + 48 bytes, and 16 more.
    assert (method.name, method.backends, method.planned_bytes) == ("forward", ("XnnpackBackend",), 192)


def test_inspect_shows_a_program_and_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = program(tmp_path / "m.pte")
    record = {
        "inputs": ["x", "ids", "flag"],
        "adapters": [{"name": "fr", "sha256": "ab" * 32, "weight": 0.5}],
        "verdict": {"outcome": "same"},
    }
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/extra/lora_export.json", json.dumps(record))
    assert call("inspect", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "m.pte: program of ExecuTorch, 1 method",
        "adapters merged into the weights: fr × 0.5 abababababab…",
        "published with the verdict: same",
        "method forward, computed by XnnpackBackend, 192 bytes of memory planned",
        "  input x  float32 of up to [4, 3]",
        "  input ids  int64 [5]",
        "  input flag  no tensor",
        "  output 0  float32 of up to [4, 2]",
        "  output 1  int64 [5]",
    ]
    code, document = answer(capsys, "inspect", path)
    assert (code, document["format"]) == (0, "program of ExecuTorch")
    assert document["methods"][0]["inputs"][0] == {"dtype": "float32", "sizes": [4, 3], "varies": True}
    assert document["adapters"][0]["name"] == "fr" and le.inspect(path).methods == read_methods(path)
    assert not document["has_damaged_record"]
    path.write_bytes(path.read_bytes()[:-5])
    assert call("inspect", path) == 0
    assert "note: the record behind the program is damaged" in capsys.readouterr().out.splitlines()[1]
    assert answer(capsys, "inspect", path)[1]["has_damaged_record"]


@pytest.mark.parametrize("content", [b"", b"ET12", PROGRAM[:8], b"x" * 100, PROGRAM.replace(b"ET12", b"ET99")])
def test_what_is_no_program_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"m\.pte is (no|a damaged) \.pte file"):
        read_methods(program(tmp_path / "m.pte", content))


def test_an_offset_beyond_the_file_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"is a damaged \.pte file: an offset leads out of it$"):
        read_methods(program(tmp_path / "m.pte", b"\xff\xff\xff\x7fET12" + PROGRAM[8:]))


def test_a_damaged_program_is_read_or_refused(tmp_path: Path) -> None:
    choose, refused = random.Random(0), 0
    for number in range(600):
        content = bytearray(PROGRAM[: choose.randrange(8, len(PROGRAM))] if number % 3 == 0 else PROGRAM)
        for _ in range(number % 3 * 4):
            content[choose.randrange(8, len(content))] = choose.choice([0, 1, 0x7F, 0x80, 0xFF])
        try:
            read_methods(program(tmp_path / "m.pte", bytes(content)))
        except InputRefused:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("limit", "message"),
    [("MOST_TENSORS", "it has more than 4 inputs and outputs"), ("MOST_READ", "its lists have more than 4 entries")],
)
def test_lists_of_a_program_are_bounded(
    limit: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_file, limit, 4)
    with pytest.raises(InputRefused, match=message):
        read_methods(program(tmp_path / "m.pte"))
