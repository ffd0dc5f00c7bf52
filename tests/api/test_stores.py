"""Commands whose inputs and outputs are in a store give what they give on the disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import save_file

import lora_export as le
from lora_export.errors import InputRefused, LoraExportError
from lora_export.storage import object_store
from lora_export.storage.object_store import Bucket
from lora_export.verification.against_checkpoint import stored_tensor
from support import gguf_files, quantised_weights, stores
from support.cli import call
from support.folder_contents import folder_contents

if TYPE_CHECKING:
    from support.stores import Stored

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def local(stored: Stored, tmp_path: Path) -> Path:
    """A base, an adapter and their merge on the disk; base and adapter are in the store too."""
    base, adapter = stores.model(tmp_path)
    stored.put("base", base)
    stored.put("adapter", adapter)
    le.merge(base, adapter, tmp_path / "merged")
    return tmp_path


def merge(stored: Stored, **options: Any) -> Any:
    return le.merge(str(stored / "base"), str(stored / "adapter"), str(stored / "out/m"), **options)


def test_a_merge_in_a_store_has_the_same_bytes(local: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    copy = Bucket.copy
    monkeypatch.setattr(Bucket, "copy", lambda own, key, target: copied.append(target) or copy(own, key, target))
    monkeypatch.setattr(tempfile, "tempdir", str(local / "nowhere"))
    monkeypatch.chdir(local / "merged")
    before = sorted(local.rglob("*"))
    report = merge(stored).report
    assert stored.files("out/m") == folder_contents(local / "merged") and sorted(local.rglob("*")) == before
    assert copied == [f"out/m/{SHARDS[2]}", "out/m/config.json"] and {result.weight for result in report.results} == {
        "up.weight",
        "down.weight",
    }


@pytest.mark.parametrize("ends", ["base", "output"])
def test_one_end_may_be_on_the_disk(local: Path, stored: Stored, ends: str) -> None:
    base, output = str(stored / "base"), str(local / "out")
    if ends == "base":
        base, output = str(local / "base"), str(stored / "out/m")
    le.merge(base, str(stored / "adapter"), output)
    assert (folder_contents(local / "out") if ends == "output" else stored.files("out/m")) == folder_contents(
        local / "merged"
    )


def test_one_file_has_the_hash_of_its_base_in_its_header(local: Path, stored: Stored) -> None:
    file = local / "base" / SHARDS[0]
    stores.peft_adapter(local / "one", {"up": (np.ones((1, 40)), np.ones((96, 1)))})
    le.merge(file, local / "one", local / "one.safetensors")
    le.merge(str(stored / f"base/{SHARDS[0]}"), local / "one", str(stored / "out/one.safetensors"))
    assert stored.get("out/one.safetensors") == (local / "one.safetensors").read_bytes()
    assert list(stored.objects("out/")) == ["out/one.safetensors"]


def stop_after_one(stored: Stored) -> Callable[..., None]:
    def stop(*_: Any) -> None:
        if SHARDS[0].encode() in stored.get("out/.m.begun"):
            raise KeyboardInterrupt

    return stop


def test_a_stopped_merge_goes_on_with_its_whole_shards(local: Path, stored: Stored) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge(stored, on_progress=stop_after_one(stored))
    first = stored.objects("out/m/")
    assert list(first) == [f"out/m/{SHARDS[0]}"] and stored.uploads() == []
    with pytest.raises(InputRefused, match="is not whole"):
        le.verify(str(stored / "out/m"), base=str(stored / "base"), adapters=str(stored / "adapter"))
    lines: list[str] = []
    report = merge(stored, on_message=lines.append).report
    assert f"{stored / 'out/m'}: 1 file that is whole, from a run that was stopped" in lines
    assert stored.files("out/m") == folder_contents(local / "merged") and len(report.results) == 2
    assert stored.objects("out/m/")[f"out/m/{SHARDS[0]}"]["LastModified"] == first[f"out/m/{SHARDS[0]}"]["LastModified"]


def test_a_stopped_merge_into_a_pipeline_goes_on(local: Path, stored: Stored) -> None:
    of_two_models(local)
    stored.put("pipeline", local / "pipeline")
    le.merge(local / "pipeline", local / "adapter", local / "whole")
    into = (str(stored / "pipeline"), str(stored / "adapter"), str(stored / "out/m"))
    with pytest.raises(KeyboardInterrupt):
        le.merge(*into, on_progress=stop_after_one(stored))
    (first,) = stored.objects("out/m/").values()
    lines: list[str] = []
    le.merge(*into, on_message=lines.append)
    assert first["Key"] == f"out/m/unet/{SHARDS[0]}" and any("1 file that is whole" in line for line in lines)
    assert stored.files("out/m") == folder_contents(local / "whole")
    assert stored.objects("out/m/")[first["Key"]]["LastModified"] == first["LastModified"]
    assert "out/.m.begun" not in stored.objects()


def test_a_stopped_merge_of_another_strength_is_made_anew(local: Path, stored: Stored) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge(stored, on_progress=stop_after_one(stored), weights=[2.0])
    merge(stored)
    assert stored.files("out/m") == folder_contents(local / "merged")


def test_a_base_that_changes_during_the_merge_is_refused(local: Path, stored: Stored) -> None:
    def change(*_: Any) -> None:
        stored.put(f"base/{SHARDS[1]}", (local / "base" / SHARDS[2]).read_bytes())

    with pytest.raises(InputRefused, match=rf"base/{SHARDS[1]} changed while it was being read"):
        merge(stored, on_progress=change)
    assert stored.objects("out/") == {} and stored.uploads() == []


def test_a_merge_that_is_refused_at_its_end_leaves_nothing(local: Path, stored: Stored) -> None:
    stores.peft_adapter(local / "none", {"up": (np.full((1, 40), 1e-9), np.ones((96, 1)))})
    with pytest.raises(LoraExportError):
        le.merge(str(stored / "base"), local / "none", str(stored / "out/m"))
    assert stored.objects("out/") == {}


def test_verify_reads_both_from_the_store_and_finds_a_wrong_number(local: Path, stored: Stored) -> None:
    merge(stored)
    base, adapter = str(stored / "base"), str(stored / "adapter")
    assert le.verify(str(stored / "out/m"), base=base, adapters=adapter)
    wrong = bytearray(stored.get(f"out/m/{SHARDS[1]}"))
    wrong[-2] ^= 64
    stored.put(f"out/m/{SHARDS[1]}", bytes(wrong))
    found = le.verify(str(stored / "out/m"), base=base, adapters=adapter)
    assert not found and "down.weight" in str(found)
    with pytest.raises(InputRefused, match=rf"{SHARDS[1]} contains other bytes than were written"):
        le.inspect(str(stored / "out/m"), check=True)


def test_verify_reads_each_weight_once_in_few_requests(
    local: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(stored)
    read, sizes = Bucket.read, list[int]()

    def counted(bucket: Bucket, key: str, start: int, stop: int) -> memoryview:
        sizes.extend([stop - start] if "model-" in key else [])
        return read(bucket, key, start, stop)

    monkeypatch.setattr(Bucket, "read", counted)
    monkeypatch.setattr("lora_export.storage.store_file.SMALL_READ", 256)
    monkeypatch.setattr(stored_tensor, "PIECE_BYTES", 8 * 40 * 10)  # ten rows
    assert le.verify(str(stored / "out/m"), base=str(stored / "base"), adapters=str(stored / "adapter"))
    weights = [one for one in sizes if one > 256]
    assert weights == [4 * 96 * 40] * 6 and sum(sizes) < 1.1 * sum(weights)


COMMANDS: dict[str, tuple[Callable[[str], Any], int]] = {  # and the most requests, of which 11 of a merge write
    "merge": (lambda at: le.merge(f"{at}/base", f"{at}/adapter", output=f"{at}/other"), 49),
    "verify": (lambda at: le.verify(f"{at}/out/m", base=f"{at}/base", adapters=f"{at}/adapter"), 23),
    "inspect": (lambda at: le.inspect(f"{at}/adapter"), 5),
    "check": (lambda at: le.check(f"{at}/adapter", runtimes=["vllm"]), 5),
    "convert": (lambda at: le.convert(f"{at}/adapter", output=f"{at}/k.safetensors", to="kohya"), 19),
    "resize": (lambda at: le.resize(f"{at}/adapter", output=f"{at}/r", rank=1), 23),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_asks_a_store_for_each_fact_once(
    command: str, local: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, most = COMMANDS[command]
    if command == "verify":
        merge(stored)
    server = stores.Failing(monkeypatch, 0, seed=0)
    run(f"s3://{stored.name}")
    assert server.requests <= most


def test_inspect_reads_headers_alone(local: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(stored)
    read, amount = Bucket.read, 0

    def counted(bucket: Bucket, key: str, start: int, stop: int) -> memoryview:
        nonlocal amount
        found = read(bucket, key, start, stop)
        amount += len(found) if key.endswith(".safetensors") else 0
        return found

    monkeypatch.setattr(Bucket, "read", counted)
    monkeypatch.setattr("lora_export.storage.store_file.SMALL_READ", 256)
    found = le.inspect(str(stored / "out/m"))
    assert found.checkpoint is not None and len(found.checkpoint.specs) == 3 and found.adapters[0].name == "adapter"
    assert amount < 3 * 1024 < found.checkpoint.nbytes


At = Callable[[str], Any]  # a key -> where it is, on the disk or in the store


def nothing_more(_: Path) -> None:
    """Base, adapter and merge are enough."""


def for_llama_cpp(folder: Path) -> None:
    """A model of llama.cpp, the model that it was made of, and an adapter for both."""
    gguf_files.llama().save_pretrained(folder / "llama")
    numbers = np.ones((2, 256)), np.ones((256, 2))
    stores.peft_adapter(folder / "on-llama", {"model.layers.0.mlp.up_proj": numbers})
    gguf_files.write_llama(folder / "base.gguf", gguf_files.Kind.Q4_0)


def in_float8(folder: Path) -> None:
    """A base with quantised weights, and an adapter for it."""
    tensors, config = quantised_weights.quantised("fp8, ragged blocks")
    folder.joinpath("fp8").mkdir()
    save_file(tensors, folder / "fp8/model.safetensors", {"format": "pt"})
    (folder / "fp8/config.json").write_text(json.dumps({"quantization_config": config}))
    rows, columns = tensors["x.weight"].shape
    stores.peft_adapter(folder / "on-fp8", {"x": (np.ones((1, columns)), np.ones((rows, 1)))})


def of_two_models(folder: Path) -> None:
    """A pipeline, of which the adapter changes one model."""
    shutil.copytree(folder / "base", folder / "pipeline/unet")
    shutil.copytree(folder / "base", folder / "pipeline/vae")
    index = {name: ["diffusers", "Model"] for name in ("unet", "vae")}
    (folder / "pipeline/model_index.json").write_text(json.dumps(index))


def with_residual(folder: Path) -> None:
    le.merge(folder / "base", folder / "adapter", folder / "kept", keep_residual=folder / "residual")


# What is written -> what it needs besides, and how it is made
WRITTEN: dict[str, tuple[Callable[[Path], None], Callable[[At], Any]]] = {
    "convert": (nothing_more, lambda at: le.convert(at("adapter"), at("out/a.safetensors"), to="kohya")),
    "convert to a folder": (nothing_more, lambda at: le.convert(at("adapter"), at("out/a"), to="mlx")),
    "convert to GGUF": (
        for_llama_cpp,
        lambda at: le.convert(at("on-llama"), at("out/a.gguf"), to="gguf", base=at("llama")),
    ),
    "resize": (nothing_more, lambda at: le.resize(at("adapter"), at("out/a"), rank=1)),
    "combine": (nothing_more, lambda at: le.combine([at("adapter")], at("out/a"))),
    "extract": (
        nothing_more,
        lambda at: le.extract(at("base"), at("merged"), at("out/a"), rank=2, layout={"*": "out_in"}),
    ),
    "unmerge": (with_residual, lambda at: le.unmerge(at("kept"), at("adapter"), at("out/a"), base_from=at("residual"))),
    "merge with a residual": (
        nothing_more,
        lambda at: le.merge(at("base"), at("adapter"), at("out/a"), keep_residual=at("out/residual")),
    ),
    "merge, quantised": (in_float8, lambda at: le.merge(at("fp8"), at("on-fp8"), at("out/a"), keep_quantised=True)),
    "merge into GGUF": (for_llama_cpp, lambda at: le.merge(at("base.gguf"), at("on-llama"), at("out/a.gguf"))),
    "merge into a pipeline": (of_two_models, lambda at: le.merge(at("pipeline"), at("adapter"), at("out/a"))),
}


def test_outputs_in_a_store_have_the_bytes_of_local_ones(
    local: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_all(place: Path | Stored) -> None:
        for number, (_, make) in enumerate(WRITTEN.values()):
            make(lambda key, folder=f"out/{number}/": str(place / key.replace("out/", folder)))

    for prepare in dict.fromkeys(prepare for prepare, _ in WRITTEN.values()):
        prepare(local)
    stored.put("", local)
    make_all(local)
    monkeypatch.setattr(tempfile, "tempdir", str(local / "nowhere"))
    monkeypatch.chdir(local / "merged")
    before = folder_contents(local)
    make_all(stored)
    for number, name in enumerate(WRITTEN):
        found, expected = stored.files(f"out/{number}"), folder_contents(local / f"out/{number}")
        if name == "extract":  # its config names its base, and its manifest has the config's hash
            expected |= {f"a/{each}": found[f"a/{each}"] for each in ("adapter_config.json", "lora_export.json")}
        assert found and found == expected, name
    assert folder_contents(local) == before


def test_no_secret_leaves_the_environment(
    local: Path, stored: Stored, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, out = (str(stored / key) for key in ("base", "adapter", "out/m"))
    codes = [
        call("merge", base, adapter, "-o", out, "-v"),
        call("verify", out, "--base", base, "-a", adapter, "--report", local / "report.json", "-v"),
        call("merge", base.replace("//", f"//KEY:{stores.SECRET}@"), adapter, "-o", out, "--json"),
        call("merge", base, adapter.replace("//", f"//KEY:{stores.SECRET}@"), "-o", out, "--json"),
    ]
    denied = b"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIAEXAMPLE</AWSAccessKeyId></Error>"
    with stores.answering(403, denied) as address:
        stored.move(monkeypatch, address)
        object_store.bucket_of.cache_clear()
        codes.append(call("merge", base, adapter, "-o", out, "-v"))
    told = "".join(capsys.readouterr()) + (local / "report.json").read_text()
    written = b"".join(stored.files("out/m").values())
    assert codes == [0, 0, 3, 3, 6] and "refused the credentials" in told
    assert all(secret not in told and secret.encode() not in written for secret in (stores.SECRET, "AKIAEXAMPLE"))


def test_sigterm_aborts_the_upload(local: Path, stored: Stored) -> None:
    program = (
        "import os, signal, sys\n"
        "from lora_export import cli\n"
        "from lora_export.storage.store_file import UploadedFile\n"
        "send = UploadedFile._send\n"
        "def stopped(own, data):\n"
        "    send(own, bytes(13 << 20))\n"  # more than a part: there is an upload to abort
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "UploadedFile._send = stopped\n"
        "cli.main()\n"
    )
    arguments = ["merge", str(stored / "base"), str(stored / "adapter"), "-o", str(stored / "out/m")]
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 143, ended.stderr
    assert stored.objects("out/") == {} and stored.uploads() == []


def test_no_option_is_a_path_of_the_disk_alone() -> None:
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in Path(le.__file__).parent.joinpath("api").glob("*.py")
    }
    assert len(texts) > 30 and [name for name, text in texts.items() if re.search(r"\bPath\(options\.", text)] == []


def test_another_file_of_a_store_is_no_checkpoint(local: Path, stored: Stored) -> None:
    stored.put("notes.txt", b"x")
    with pytest.raises(InputRefused, match=r"notes\.txt is no checkpoint: give a Hugging Face folder"):
        le.convert(local / "adapter", local / "out", to="peft", base=str(stored / "notes.txt"))
