"""Processes for TorchScript files that tests share: they answer, and end, as those of the package do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.isolation.process import ProcessEnded
from lora_export.runtime.torchscript.runner import ScriptRunner
from support import warm_children
from support.warm_children import WarmChild

X = torch.ones(1, 2)


@pytest.mark.parametrize(("warm", "kind"), [(True, WarmChild), (False, subprocess.Popen)])
def test_a_child_answers_and_ends_as_the_packages(
    warm: bool, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_children.install()
    monkeypatch.setattr(warm_children.use, "warm", warm)
    module = torch.nn.Linear(2, 2)
    torch.jit.trace(module, X).save(tmp_path / "m.pt")
    runner = ScriptRunner(tmp_path / "m.pt", ["x"])
    process: Any = runner._process
    assert isinstance(process._process, kind) and process.is_running
    (output,) = runner.run({"x": X.numpy()}).values()
    torch.testing.assert_close(torch.tensor(output), module(X))
    process.kill()
    with pytest.raises(ProcessEnded, match=r"SIGKILL. It may take 2 GiB") as ended:
        process.answer(5)
    assert ended.value.killed and not process.is_running
