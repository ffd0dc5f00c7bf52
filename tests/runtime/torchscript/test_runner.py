"""TorchScript files are run in a child process: without output, without files, within time and memory."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.runtime.torchscript.runner import ScriptRunner
from support.slow import slow

X = {"x": np.array([[1.0, 2.0]], np.float32)}


class Difference(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left - right


class Loading(nn.Module):
    """Writes a file while it is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = bool(torch.from_file(self.target, True, 16).sum() > 0) and state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Loud(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("same: forged")
        return x


@pytest.fixture
def unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that runs any code: the second wall alone."""
    (tmp_path / "sitecustomize.py").write_text(
        "import lora_export.runtime.torchscript.code_check as c\nc.check_code = lambda *_: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module.eval()), path)
    return path


def test_inputs_are_given_in_traced_order(tmp_path: Path) -> None:
    script = torch.jit.trace(Difference(), (torch.ones(2), torch.ones(2)))
    torch.jit.save(script, tmp_path / "d.pt", _extra_files={"lora_export.json": '{"inputs": ["left", "right"]}'})
    runner = ScriptRunner(tmp_path / "d.pt", ["right", "left"])
    inputs = {"right": np.array([1, 1], np.float32), "left": np.array([5, 7], np.float32)}
    assert runner.run(inputs)["output_0"].tolist() == [4, 6]
    with pytest.raises(RuntimeRefused, match="right"):
        runner.run({"left": inputs["left"]})


def test_file_without_torchscript_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(InputRefused, match="no TorchScript"):
        ScriptRunner(tmp_path / "noise.pt", [])


def test_path_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    (path := tmp_path / os.fsdecode(b"m\xff.pt")).write_bytes(b"")
    with pytest.raises(InputRefused, match=r"m\\udcff\.pt is not UTF-8, and PyTorch's reader takes no such path"):
        ScriptRunner(path, ["x"])


def test_outputs_have_their_names_and_dtypes(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"half": x.to(torch.bfloat16), "whole": x.to(torch.int64), "none": x[:, :0]}

    runner = ScriptRunner(saved(Named(), tmp_path / "n.pt"), ["x"])
    outputs = runner.run(X)
    assert runner.names_known and outputs["half"].dtype == ml_dtypes.bfloat16
    assert {name: value.astype(np.float32).tolist() for name, value in outputs.items()} == {
        "half": [[1, 2]],
        "whole": [[1, 2]],
        "none": [[]],
    }


@pytest.mark.slow
def test_state_is_every_parameter_and_buffer(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = ScriptRunner(saved(module, tmp_path / "s.pt"), ["x"]).state()
    assert state.keys() == module.state_dict().keys()
    assert all(np.array_equal(state[name], value.numpy()) for name, value in module.state_dict().items())


def test_file_that_writes_files_while_it_loads_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "planted.py"
    saved(Loading(str(target)), tmp_path / "l.pt")
    torch.jit.load(tmp_path / "l.pt")
    assert target.exists()  # PyTorch itself runs it
    target.unlink()
    with pytest.raises(InputRefused, match=r"'torch.from_file' is not among the operators"):
        ScriptRunner(tmp_path / "l.pt", ["x"])
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.processes
def test_child_cannot_write_files_even_without_the_check(tmp_path: Path, unchecked: None) -> None:
    target = tmp_path / "planted"
    saved(Loading(str(target)), tmp_path / "l.pt")
    with pytest.raises((RuntimeRefused, InputRefused)):
        ScriptRunner(tmp_path / "l.pt", ["x"])
    assert not target.exists() or not target.stat().st_size


def test_print_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"line \d+: 'print' is not among the operators"):
        ScriptRunner(saved(Loud(), tmp_path / "p.pt"), ["x"])


@pytest.mark.slow
@pytest.mark.processes
def test_child_prints_nothing_even_without_the_check(
    tmp_path: Path, unchecked: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ScriptRunner(saved(Loud(), tmp_path / "p.pt"), ["x"]).run(X)["output_0"].tolist() == [[1, 2]]
    assert "forged" not in "".join(capfd.readouterr())
    torch.jit.load(tmp_path / "p.pt")(torch.ones(1))
    assert "forged" in "".join(capfd.readouterr())  # PyTorch itself prints it


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
@pytest.mark.processes
def test_memory_of_a_script_is_bounded(tmp_path: Path) -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(1 << 30).sum()  # 4 GiB

    runner = ScriptRunner(saved(Greedy(), tmp_path / "g.pt"), ["x"])
    with pytest.raises(RuntimeRefused, match=r"memory.*Allow more with memory="):
        runner.run(X)


def test_script_without_end_is_stopped(tmp_path: Path) -> None:
    class Endless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while bool(x.sum() > 0):
                x = x + 1
            return x

    runner = ScriptRunner(saved(Endless(), tmp_path / "e.pt"), ["x"])
    runner.timeout = 0.5
    with pytest.raises(RuntimeRefused, match=r"e\.pt did not finish within 0\.5 seconds"):
        runner.run(X)


def test_error_of_a_script_is_one_line(tmp_path: Path) -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool(x.sum() > 0):
                raise ValueError("forged\n::error::line")
            return x

    with pytest.raises(RuntimeRefused) as refused:
        ScriptRunner(saved(Failing(), tmp_path / "f.pt"), ["x"]).run(X)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.processes
def test_child_ends_with_its_runner(tmp_path: Path) -> None:
    runner = ScriptRunner(saved(nn.Identity(), tmp_path / "i.pt"), ["x"])
    process = runner._process._process
    del runner
    assert process.poll() is not None


def test_child_that_dies_is_explained(tmp_path: Path) -> None:
    runner = ScriptRunner(saved(nn.Identity(), tmp_path / "i.pt"), ["x"])
    runner._process.kill()
    hint = r"It may take 2 GiB of memory\. Allow more with memory="
    with pytest.raises(RuntimeRefused, match=rf"the process that runs .*i\.pt ended: SIGKILL\. {hint}"):
        runner.run(X)


@pytest.mark.processes
def test_child_that_does_not_start_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeRefused, match="exit code 1"):
        ScriptRunner(saved(nn.Identity(), tmp_path / "i.pt"), ["x"])


@pytest.mark.parametrize(
    "record", ["{", *map(slow, ("[1]", '{"inputs": 3}', '{"inputs": [1]}', '{"inputs": ["a\\n::error::"]}'))]
)
def test_damaged_record_of_inputs_is_refused(tmp_path: Path, record: str) -> None:
    torch.jit.save(torch.jit.script(nn.Identity()), tmp_path / "r.pt", _extra_files={"lora_export.json": record})
    with pytest.raises(InputRefused, match=r"its record lora_export\.json is damaged"):
        ScriptRunner(tmp_path / "r.pt", ["x"])


@pytest.mark.slow
def test_record_without_inputs_leaves_the_models_names(tmp_path: Path) -> None:
    record = json.dumps({"inputs": []})
    torch.jit.save(torch.jit.script(nn.Identity()), tmp_path / "r.pt", _extra_files={"lora_export.json": record})
    assert ScriptRunner(tmp_path / "r.pt", ["x"]).input_names == ("x",)


@pytest.mark.slow
@pytest.mark.processes
def test_standard_library_streams_are_untouched(tmp_path: Path) -> None:
    before = (sys.stdin, sys.stdout, io.TextIOWrapper)
    ScriptRunner(saved(nn.Identity(), tmp_path / "i.pt"), ["x"]).close()
    assert before == (sys.stdin, sys.stdout, io.TextIOWrapper)
