"""`assert_parity`: the verdict as an assertion of somebody else's suite."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_export as le
from lora_export import cli
from lora_export.errors import InputRefused, WrongUsage
from lora_export.models.load import load_model
from lora_export.options.reading import ReadOptions
from lora_export.testing import ParityFailed, assert_parity
from lora_export.verification.parity import Outcome
from support import FACTORIES
from support.factories import scaled
from support.handmade import peft_adapter

FACTORY = f"{FACTORIES}:scaled"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, one that is too weak to see, and right and wrong graphs with the first."""
    folder = tmp_path_factory.mktemp("parity")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 8)), rng.standard_normal((8, 2))
    for name, size in (("adapter", 1.0), ("weak", 1e-8)):
        peft_adapter(folder / name, {"dense": (a, b * size)})
    for name, weight in (("right", "1"), ("wrong", "1.1")):
        words = ["torchscript", FACTORY, "-a", str(folder / "adapter"), "--weight", weight, "--no-verify"]
        assert cli.run([*words, "-o", str(folder / f"{name}.pt")]) == 0
    return folder


def test_what_is_right_returns_its_proof(place: Path) -> None:
    proof = assert_parity(place / "right.pt", FACTORY, place / "adapter", cache=place / "cache")
    assert proof.verdict.same and len(proof.cases) >= 3
    assert list((place / "cache").iterdir())


def test_what_is_wrong_fails_with_the_commands_own_screen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ParityFailed) as failed:
        assert_parity(str(place / "wrong.pt"), FACTORY, [str(place / "adapter")])
    assert isinstance(failed.value, AssertionError)
    assert failed.value.proof.verdict.outcome is Outcome.DIFFERENT
    capsys.readouterr()
    assert cli.run(["verify", str(place / "wrong.pt"), "--model", FACTORY, "-a", str(place / "adapter"), "-v"]) == 4
    headline, recorded, *lines = capsys.readouterr().out.splitlines()
    assert "the weight 1.1" in recorded  # by the record in the file
    told = str(failed.value).replace("(inputs=)", "(--inputs)").replace('(weights="1.1")', "(--weight 1.1)")
    assert told.splitlines() == [headline, recorded, *lines]
    assert_parity(place / "wrong.pt", FACTORY, place / "adapter", weights=[1.1])


def test_what_could_not_have_failed_has_not_passed(place: Path) -> None:
    with pytest.raises(ParityFailed, match=r"(?s)^undecided: .*what would decide it: an atol= below"):
        assert_parity(place / "right.pt", FACTORY, place / "adapter", atol=1e6)
    with pytest.raises(ParityFailed, match=r"^undecided: "):
        module, examples = scaled()
        assert_parity(module, (module, examples), place / "weak")


@pytest.mark.slow
def test_modules_in_memory_are_judged_and_stay_as_they_are(place: Path) -> None:
    module, examples = scaled()
    module = module.train()
    before = copy.deepcopy(module.state_dict())
    assert_parity(copy.deepcopy(module), (module, examples))
    with pytest.raises(ParityFailed, match="The candidate matches the model without its adapters"):
        assert_parity(copy.deepcopy(module), (module, examples), place / "adapter")
    assert module.training and all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert_parity(place / "right.pt", load_model(FACTORY), place / "adapter")


def test_what_was_asked_wrongly_is_no_failure_of_the_candidate(place: Path) -> None:
    with pytest.raises(InputRefused, match="there is no candidate"):
        assert_parity(place / "absent.onnx", FACTORY)
    with pytest.raises(WrongUsage, match="there is no adapter"):
        assert_parity(place / "right.pt", FACTORY, weights=[2.0])
    with pytest.raises(WrongUsage, match=r"onnx_adapter= and adapter_id=: the candidate is no file"):
        assert_parity(scaled()[0], FACTORY, onnx_adapter="de.onnx_adapter", adapter_id=0)


@pytest.mark.slow
def test_adapters_are_applied_as_by_verify(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    other = peft_adapter(tmp_path / "other", {"renamed": (rng.standard_normal((2, 8)), rng.standard_normal((8, 2)))})
    adapters = [str(place / "adapter"), str(other)]
    how = {"prefixes": {"renamed": "dense"}, "combination": "linear"}
    le.export_torchscript(FACTORY, tmp_path / "m.pt", adapters=adapters, weights=[1.0, -2.0], **how)
    assert assert_parity(tmp_path / "m.pt", FACTORY, adapters, weights=[1.0, -2.0], **how).verdict.same
    with pytest.raises(ParityFailed):
        assert_parity(tmp_path / "m.pt", FACTORY, adapters, weights=[1.0, -2.0], prefixes=how["prefixes"])
    with pytest.raises(WrongUsage, match="moe_b_layout="):
        assert_parity(tmp_path / "m.pt", FACTORY, adapters, reading=ReadOptions(moe_b_layout="rows"))
