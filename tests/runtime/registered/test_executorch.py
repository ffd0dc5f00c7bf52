"""A .pte of ExecuTorch is exported, proven and refused. ExecuTorch itself is in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_export import cli
from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.executorch_file import read_methods
from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.runtime.registered import executorch, stated_by
from support import FACTORIES, ROOT
from support.small_models import small_adapter, small_model

PYTHON = os.environ.get("EXECUTORCH_PYTHON", "")  # of an environment that has ExecuTorch: make test-executorch
real = pytest.mark.skipif(not PYTHON, reason="ExecuTorch is in an environment of its own: make test-executorch")


def called(*arguments: object) -> tuple[int, dict[str, Any], str]:
    """The exit code, the JSON document and the messages of a command, in ExecuTorch's environment."""
    command = [PYTHON, "-W", "ignore", "-m", "lora_export", *map(str, arguments), "--json"]
    if arguments[0] == "verify":
        command += ["--timeout", "600"]  # on a busy machine, the imports of ExecuTorch alone may take a minute
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.stdout.startswith("{"), f"exit code {done.returncode}, and no document: {done.stdout}{done.stderr}"
    return done.returncode, {"outcome": "", **json.loads(done.stdout)}, done.stdout[:2000] + done.stderr


@real
@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_a_merged_program_is_the_adapted_model(family: str, tmp_path: Path) -> None:
    base, out = small_model(family, tmp_path / "base"), tmp_path / "m.pte"
    adapter = small_adapter(family, base, tmp_path / "adapter")
    code, document, messages = called("torchscript", base, "-a", adapter, "-o", out)
    assert (code, document["proof"]["outcome"]) == (0, "same"), messages
    assert "the file takes sizes of up to batch 4" in messages
    record = open_artifact(out).record
    assert record.mode == "merged" and record.content["verdict"]["outcome"] == "same"
    code, document, messages = called("verify", out, "--model", base, "-a", adapter)
    assert (code, document["outcome"]) == (0, "same"), messages
    for wrong in (["-a", adapter, "--weight", "1.1"], []):
        code, document, messages = called("verify", out, "--model", base, *wrong)
        assert (code, document["outcome"]) == (4, "different"), messages
    plain = tmp_path / "plain.pte"  # as ExecuTorch itself writes it: without a record
    with zipfile.ZipFile(out) as archive:
        plain.write_bytes(out.read_bytes()[: archive.infolist()[0].header_offset])
    code, document, messages = called("verify", plain, "--model", base, "-a", adapter)
    assert (code, document["outcome"]) == (0, "same"), messages


@real
def test_a_program_of_small_and_large_sizes(tmp_path: Path) -> None:
    """With nodes, one text at a time, and more tokens than without the option."""
    base, out = small_model("llama", tmp_path / "base"), tmp_path / "m.pte"
    adapter, options = small_adapter("llama", base, tmp_path / "adapter"), ["--max-size", "batch=1"]
    options += ["--max-size", "sequence=200", "--lora", "nodes"]
    code, document, messages = called("torchscript", base, "-a", adapter, "-o", out, *options)
    assert (code, document["proof"]["outcome"]) == (0, "same"), messages
    assert "the file takes sizes of up to batch 1, sequence 200" in messages
    np.savez(tmp_path / "long.npz", input_ids=np.arange(200)[None] % 60, attention_mask=np.ones((1, 200), np.int64))
    inputs = ["--inputs", tmp_path / "long.npz"]
    assert called("verify", out, "--model", base, "-a", adapter, *inputs)[0] == 0


@real
def test_a_program_takes_adapters_as_inputs(tmp_path: Path) -> None:
    """Two adapters with which it was exported, and a third one of a smaller rank, which is converted for it."""
    base, out, file = small_model("llama", tmp_path / "base"), tmp_path / "m.pte", tmp_path / "es.safetensors"
    fr, de, es = (small_adapter("llama", base, tmp_path / f"a{seed}", seed=seed) for seed in (1, 2, 3))
    how = ["--lora", "inputs", "--max-rank", "12", "--max-size", "batch=2"]
    code, document, messages = called("torchscript", base, "-a", fr, "-a", de, "-o", out, *how)
    assert (code, document["proof"]["outcome"]) == (0, "same"), messages
    assert {name: proof["outcome"] for name, proof in document["adapters"].items()} == {"a1": "same", "a2": "same"}
    assert [Path(path).name for path in document["files"]] == ["m.pte", "a1.safetensors", "a2.safetensors"]
    record = open_artifact(out).record
    assert record.mode == "inputs" and record.content["verdict"]["adapters"]["a2"]["outcome"] == "same"
    (method,) = read_methods(out)
    assert method.backends == ("XnnpackBackend",) and len(method.inputs) == len(record.content["inputs"]) == 2 + 28
    assert called("convert", es, "--for", out, "-o", file)[0] == 0
    with_file = ["--onnx-adapter", file]
    for options, expected in (
        (["-a", es, *with_file], (0, "same")),
        (["-a", es], (0, "same")),
        ([], (0, "same")),
        (["-a", fr, *with_file], (4, "different")),
    ):
        code, document, messages = called("verify", out, "--model", base, *options)
        assert (code, document["outcome"]) == expected, messages
    assert "You gave `a1`; this file contains `es.safetensors`" in str(document["recorded"])


@real
def test_a_damaged_program_is_refused(tmp_path: Path) -> None:
    base, file = small_model("vit", tmp_path / "base"), tmp_path / "m.pte"
    for content in (b"", b"no program" * 100, b"\x1c\x00\x00\x00ET12" + bytes(range(256)) * 40):
        file.write_bytes(content)
        code, _, messages = called("verify", file, "--model", base)
        assert code == 3 and "is no .pte file that ExecuTorch " in messages, messages


# --- Without ExecuTorch ---


class Method:
    """A method of ExecuTorch's runtime: it adds two inputs of up to 4 x 3 tokens, or of just these sizes."""

    def __init__(self, *, is_static: bool) -> None:
        info = SimpleNamespace(sizes=lambda: (4, 3), dtype=lambda: 4)
        self.metadata = SimpleNamespace(num_inputs=lambda: 2, input_tensor_meta=lambda at: info)
        self.is_static, self._method = is_static, self

    def set_inputs(self, tensors: list[torch.Tensor]) -> None:
        if self.is_static and any(tensor.shape != (4, 3) for tensor in tensors):
            raise RuntimeError("error 0x10")

    def execute(self, tensors: list[torch.Tensor]) -> list[Any]:
        if tensors[0].shape[0] > 4:
            raise RuntimeError("method->execute() failed with error 0x12\nand more")
        return [10 * tensors[0] + tensors[1], 7]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_it(names: list[str], *, is_static: bool = False, record: str = "", methods: Any = None) -> Any:
        program = SimpleNamespace(load_method=(methods or {"forward": Method(is_static=is_static)}).__getitem__)
        runtime = SimpleNamespace(get=lambda: SimpleNamespace(load_program=lambda path: program))
        package = SimpleNamespace(Runtime=runtime, __version__="1.5")
        monkeypatch.setattr(executorch, "optional_package", lambda *_: package)
        monkeypatch.setattr(executorch, "bound_child", lambda memory: None)
        path = tmp_path / "m.pte"
        path.write_bytes(b"program")
        if record:
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("m/extra/lora_export.json", record)
        return executorch.ExecuTorchProgram(path, names, 1 << 30)

    return open_it


def test_inputs_have_the_order_of_the_record_or_of_the_model(opened: Any) -> None:
    arrays = {"mask": np.ones((2, 3), np.int64), "ids": np.full((2, 3), 5), "types": np.zeros((2, 3), np.int64)}
    for names, record, expected in (
        (["ids", "mask", "types"], "", 51),
        (["ids", "mask"], '{"inputs": ["mask", "ids"]}', 15),
    ):
        program = opened(names, record=record)
        assert [each.tolist() for each in program(arrays)] == [[[expected] * 3] * 2]
    for names, record in ((["ids"], ""), (["ids", "mask"], '{"inputs": ["ids"]}'), (["a", "b"], '{"inputs": "ab"}')):
        with pytest.raises(InputRefused, match=r"m\.pte takes 2 inputs, and "):
            opened(names, record=record)


@pytest.mark.parametrize(("is_static", "axes", "limits"), [(True, [4, 3], [4, 3]), (False, [None, None], [0, 0])])
def test_the_sizes_of_a_program_are_those_of_its_memory(
    is_static: bool, axes: list[Any], limits: list[int], opened: Any
) -> None:
    stated = stated_by(opened(["ids", "mask"], is_static=is_static))
    assert stated["axes"] == {"ids": axes, "mask": axes}
    assert stated["limits"]["ids"] == list(zip(limits, (4, 3), strict=True))
    assert stated["notes"] == ["run by ExecuTorch 1.5"] and stated["plans_memory"]


def test_what_a_program_does_not_take_is_refused(opened: Any) -> None:
    program = opened(["ids", "mask"])
    with pytest.raises(RuntimeRefused, match=r"takes ids as torch\.int64, and not as torch\.float32"):
        program({"ids": np.ones((2, 3), np.float32), "mask": np.ones((2, 3), np.int64)})
    with pytest.raises(RuntimeRefused, match=r"^ExecuTorch: method->execute\(\) failed with error 0x12$"):
        program(dict.fromkeys(("ids", "mask"), np.ones((5, 3), np.int64)))
    with pytest.raises(InputRefused, match="has no method forward"):
        opened(["ids"], methods={"other": None})


@pytest.mark.skipif(find_spec("executorch") is not None, reason="ExecuTorch is installed")
def test_executorch_is_named_where_it_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.pte").write_bytes(b"program")
    with pytest.raises(EnvironmentLacking, match=r"a \.pte file needs executorch.*: pip install '.*executorch"):
        executorch.open_executorch(open_artifact(tmp_path / "m.pte"), ["ids"])
    assert cli.run(["torchscript", f"{FACTORIES}:worded", "-o", str(tmp_path / "n.pte")]) == 6
    assert "a .pte file needs executorch" in capsys.readouterr().err


def test_a_process_that_serves_a_program_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def start(module: str, *arguments: object, memory: int) -> Any:
        started.extend([module, arguments, memory])
        raise RuntimeRefused("enough")

    monkeypatch.setattr(executorch.IsolatedProcess, "start", start)
    (tmp_path / "m.pte").write_bytes(b"program")
    with pytest.raises(RuntimeRefused, match="enough"):
        executorch.open_executorch(open_artifact(tmp_path / "m.pte"), ["ids", "mask"])
    module, (path, *rest), memory = started
    assert module == executorch.__name__ and path == tmp_path / "m.pte"
    assert rest == [memory, "ids", "mask"] and memory == 4 * len(b"program") + (2 << 30)
