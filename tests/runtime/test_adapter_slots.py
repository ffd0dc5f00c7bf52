"""Adapters that are loaded into the slots of a session while it runs, compared with PEFT."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import lora_export as le
from lora_export import formats, plan
from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import contract_dora_factors, insert_inputs
from lora_export.graph.insert.adapter_slots import insert_slots
from lora_export.provenance import SLOTS_KEY
from lora_export.runtime.adapter_slots import AdapterSlots
from lora_export.runtime.onnx_runner import OnnxRunner
from support.graphs import run
from support.small_graphs import filled

NAMES = ["a", "b", "c", "d", "e", "f"]
SLOTS, RANK = 3, 4
X = np.random.default_rng(0).standard_normal((6, 4, 32)).astype(np.float32)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def module() -> Two:
    torch.manual_seed(0)
    return Two()


def graph() -> ir.Model:
    weights = {name: value.detach().numpy().T for name, value in module().named_parameters()}
    return filled(
        """g (float[N,S,32] x) => (float[N,S,8] y) <float[1,1] up.weight = {0}, float[1,1] down.weight = {0}>
        { [up] a = MatMul(x, up.weight)
          b = Tanh(a)
          [down] y = MatMul(b, down.weight) }""",
        **weights,
    )


def peft_model(seed: int, rank: int, dora: bool) -> peft.PeftModel:
    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["up", "down"], use_dora=dora)
    model = peft.get_peft_model(module(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


class Fleet:
    """A graph with three slots, six adapters of PEFT as files, and what each of them computes of X."""

    def __init__(self, folder: Path, *, per_row: int = 1):
        self.graph, self.adapters = folder / "served.onnx", folder / "adapters"
        self.adapters.mkdir()
        self.model = graph()
        weights = [] if per_row > 1 else ["up.weight", "down.weight"]
        shapes = {"slots": SLOTS, "max_rank": RANK, "batch": "N", "per_row": per_row}
        self.contract = insert_slots(
            self.model, find_sites(self.model), ["up.weight", "down.weight"], dora=weights, **shapes
        )
        ir.save(self.model, self.graph)
        with torch.no_grad():
            self.expected: dict[str | None, NDArray[np.float32]] = {None: module()(torch.from_numpy(X)).numpy()}
        for number, name in enumerate(NAMES, 1):
            self.write(name, number, dora=number == 2 and per_row == 1)

    def write(self, name: str, seed: int, *, rank: int = 0, dora: bool = False) -> Path:
        """Train an adapter, and put its file in the place of an earlier one, in one step."""
        path = self.adapters / f"{name}.onnx_adapter"
        model = peft_model(seed, rank or 1 + seed % RANK, dora)
        model.save_pretrained(self.adapters / f"of {name}")
        adapter = formats.load(self.adapters / f"of {name}")
        steps = plan.make([adapter], [place.spec for place in self.contract.places])
        factors = contract_dora_factors(self.model, self.contract, steps, adapter.name)
        values = onnx_adapter.input_values(self.contract, steps, adapter.name, factors)
        onnx_adapter.write(path.with_suffix(".new"), values, self.contract, sha256="0")
        path.with_suffix(".new").replace(path)
        with torch.no_grad():
            self.expected[name] = model(torch.from_numpy(X)).numpy()
        return path

    def check(self, slots: AdapterSlots, names: Sequence[str | None]) -> None:
        x = X[: len(names)]
        output = slots.run({"x": x}, names)["y"]
        expected = np.stack([self.expected[name][row] for row, name in enumerate(names)])
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_each_row_has_its_adapter_and_the_least_used_makes_place(fleet: Fleet) -> None:
    slots = le.AdapterSlots(fleet.graph, fleet.adapters)
    assert min(np.abs(fleet.expected[name] - fleet.expected[None]).max() for name in NAMES) > 0.1
    fleet.check(slots, ["a", None, "b", "a", "c"])
    assert slots.loaded == ("a", "b", "c")
    fleet.check(slots, ["a"])
    fleet.check(slots, [None, "d"])
    assert slots.loaded == ("c", "a", "d")
    fleet.check(slots, ["e", "f", "b"])
    base = slots.run({"x": X}, [None] * len(X))["y"]
    assert base.tobytes() == run(graph(), x=X)["y"].tobytes()


def test_a_changed_file_is_loaded_again_and_equal_contents_are_not(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = AdapterSlots(fleet.graph, fleet.adapters)
    fleet.check(slots, ["a", "b"])
    path, written = fleet.adapters / "a.onnx_adapter", []
    fill = slots._stacks.fill
    monkeypatch.setattr(slots._stacks, "fill", lambda *own: (written.append(own[1]), fill(*own)))
    os.utime(path, ns=(1, 1))
    fleet.check(slots, ["a"])
    assert not written
    with slots.use(["a"]) as ids:  # a run of the earlier version goes on
        before = fleet.expected["a"]
        fleet.write("a", 77)
        fleet.check(slots, ["a", "b", "a"])
        assert written and written != ids.tolist() and np.abs(before - fleet.expected["a"]).max() > 0.1
    fleet.check(slots, ["a", "c"])
    assert len(slots.loaded) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zzz", "there is no adapter 'zzz'"),
        ("../adapters/a", "there is no adapter '../adapters/a'"),
        ("x" * 5000, "there is no adapter 'xxx"),
        ("\ud800", r"there is no adapter '\\ud800'"),
        ("torn", "torn.onnx_adapter"),
        ("other", "made for another base"),
    ],
)
def test_a_refused_adapter_is_named_and_all_else_is_served(fleet: Fleet, name: str, message: str) -> None:
    (fleet.adapters / "torn.onnx_adapter").write_bytes((fleet.adapters / "a.onnx_adapter").read_bytes()[:-40])
    path, other = fleet.adapters / "other.onnx_adapter", replace(fleet.contract, base="f" * 16)
    onnx_adapter.write(path, fleet.contract.without_adapter(), other, sha256="0")
    slots = AdapterSlots(fleet.graph, fleet.adapters)
    fleet.check(slots, ["a", "b"])
    with pytest.raises(InputRefused, match=message):
        slots.run({"x": X[:2]}, ["a", name])
    with pytest.raises(InputRefused, match=message):
        slots.prefetch(name).result()
    fleet.check(slots, ["a", None, "c"])
    assert slots._users == [0] * (SLOTS + 1)


def test_more_adapters_than_slots_and_pinned_ones_are_refused(fleet: Fleet) -> None:
    slots = AdapterSlots(fleet.graph, lambda name: fleet.adapters / f"{name}.onnx_adapter")
    with pytest.raises(InputRefused, match="3 slots, for 4 adapters"):
        slots.run({"x": X[:4]}, ["a", "b", "c", "d"])
    slots.pin("a")
    slots.pin("b")
    for name in ("c", "d", "e"):
        fleet.check(slots, [name, "a"])
    with pytest.raises(InputRefused, match="no slot is left beside 2 pinned adapters"):
        slots.run({"x": X[:2]}, ["c", "d"])
    assert set(slots.loaded) == {"a", "b", "e"}
    slots.unpin("a")
    slots.unload("b")
    fleet.check(slots, ["c", "d", "f"])
    slots.prefetch("a").result()
    assert "a" in slots.loaded


def test_several_adapters_of_a_row_are_added_up(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, per_row=2)
    slots = AdapterSlots(fleet.graph, fleet.adapters)
    fleet.check(slots, ["a", None, "c"])
    rows, scales = [["a", "b"], ["b"], [None]], [[1.0, 0.0], [1.0], [1.0]]
    output = slots.run({"x": X[:3]}, rows, scales=scales)["y"]
    expected = np.stack([fleet.expected[name][row] for row, name in enumerate(("a", "b", None))])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    array = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_array_equal(slots.run({"x": X[:3]}, rows, scales=array)["y"], output)
    for wrong in (scales[:2], [*scales[:2], [1.0, 1.0, 1.0]], np.ones(3), np.ones((3, 2, 1))):
        with pytest.raises(InputRefused, match="a list for each of 3 rows, of at most 2 factors"):
            slots.run({"x": X[:3]}, rows, scales=wrong)
    for bad in (np.nan, -np.inf, 1e39):
        with pytest.raises(InputRefused, match="scales must be finite numbers in float32"):
            slots.run({"x": X[:3]}, rows, scales=[[1.0, bad], [1.0], [1.0]])
    with pytest.raises(InputRefused, match="2 adapters on a row, not 3"):
        slots.run({"x": X[:1]}, [["a", "b", "c"]])


@pytest.mark.parametrize("per_row", [1, 2])
def test_factors_of_single_adapters_are_refused(tmp_path: Path, per_row: int) -> None:
    fleet = Fleet(tmp_path, per_row=per_row)
    with pytest.raises(InputRefused, match="and rows with lists of adapters"):
        AdapterSlots(fleet.graph, fleet.adapters).run({"x": X[:1]}, ["a"], scales=[[0.5]])


def test_a_run_reads_its_own_inputs_with_an_adapter_for_each_row(fleet: Fleet) -> None:
    slots = AdapterSlots(fleet.graph, fleet.adapters)
    fleet.check(slots, ["a"])
    for feeds in ({}, {"x": X[:1], "adapter_ids": np.ones(1, np.int64)}):
        with pytest.raises(InputRefused, match="takes x, and the run has"):
            slots.run(feeds, ["a"])
    with pytest.raises(InputRefused, match="x has 6 rows, and there are adapters for 1"):
        slots.run({"x": X}, ["a"])
    assert np.array_equal(slots.run({"x": X.astype(">f4")}, ["a"] * 6)["y"], slots.run({"x": X}, ["a"] * 6)["y"])


def test_a_graph_without_slots_is_refused(tmp_path: Path) -> None:
    model = graph()
    insert_inputs(model, find_sites(model), ["up.weight"])
    ir.save(model, tmp_path / "inputs.onnx")
    with pytest.raises(InputRefused, match="has no slots"):
        AdapterSlots(tmp_path / "inputs.onnx", tmp_path)


@pytest.mark.parametrize("old", ['"slots": 3', '"dtype": "float32"'])
def test_a_graph_that_its_record_does_not_fit_is_refused(fleet: Fleet, old: str) -> None:
    record = fleet.model.metadata_props[SLOTS_KEY]
    fleet.model.metadata_props[SLOTS_KEY] = record.replace(old, old.replace("32", "16").replace("3", "2"))
    ir.save(fleet.model, fleet.graph)
    with pytest.raises(InputRefused, match=r"has no input up\.lora_A\.weight of float"):
        AdapterSlots(fleet.graph, fleet.adapters)


def test_a_session_of_one_adapter_refuses_a_graph_of_slots(fleet: Fleet) -> None:
    with pytest.raises(InputRefused, match=r"has slots, which lora_export\.AdapterSlots fills"):
        le.Session(fleet.graph)


def test_one_file_for_a_graph_of_slots_is_refused(fleet: Fleet) -> None:
    with pytest.raises(InputRefused, match=r"holds no adapters: leave onnx_adapter= out, all are proven"):
        OnnxRunner(fleet.graph).with_adapter(fleet.adapters / "a.onnx_adapter")


class Threads:
    """Eight threads that compare random batches of a fleet's adapters with PEFT, while adapters are replaced.

    With `renewed`, one of them also puts other files in the places of these adapters.
    """

    def __init__(self, fleet: Fleet, names: Sequence[str], *, rounds: int, renewed: Sequence[str] = ()):
        self.fleet, self.names, self.rounds, self.renewed = fleet, names, rounds, renewed
        self.slots = AdapterSlots(fleet.graph, fleet.adapters)
        self.done, self.written = [0] * 8, 0
        self.failures: list[BaseException] = []

    def run(self, seconds: float) -> None:
        """Run all rounds, or until the time is over. Raises the first failure of a thread."""
        end = time.monotonic() + seconds
        # Daemons, so that a deadlock ends this test and not the exit of the process.
        threads = [threading.Thread(target=self._work, args=(number, end), daemon=True) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end + 60 - time.monotonic()))
        if self.failures:
            raise self.failures[0]
        assert not any(thread.is_alive() for thread in threads)
        assert self.slots._users == [0] * (SLOTS + 1) and not self.slots._loading

    def _work(self, number: int, end: float) -> None:
        rng = np.random.default_rng(number)
        try:
            while not self.failures and self.done[number] < self.rounds and time.monotonic() < end:
                self._round(number, rng)
                self.done[number] += 1
        except BaseException as failure:  # noqa: BLE001
            self.failures.append(failure)

    def _round(self, number: int, rng: np.random.Generator) -> None:
        few = [None, *rng.choice(self.names, rng.integers(1, SLOTS + 1), replace=False)]
        self.fleet.check(self.slots, [few[one] for one in rng.integers(0, len(few), len(X))])
        if number == 0:
            self.slots.unload(str(rng.choice(self.names)))
        if number == 1 and self.renewed and not self.done[number] % 50:
            self._renew(str(rng.choice(self.renewed)))

    def _renew(self, name: str) -> None:
        """Put a new file in the place of an adapter's that no other thread uses, and see that its rows are new."""
        self.written += 1
        self.fleet.write(name, 10_000 + self.written)
        self.fleet.check(self.slots, [name] * 2 + [None])


def test_eight_threads_never_get_a_neighbours_adapter(fleet: Fleet) -> None:
    threads = Threads(fleet, NAMES[:-1], rounds=10, renewed=NAMES[-1:])
    threads.run(60)
    assert sum(threads.done) == 80 and threads.written


@pytest.mark.soak
def test_eight_threads_with_a_thousand_adapters_never_get_a_neighbours(
    fleet: Fleet, request: pytest.FixtureRequest
) -> None:
    names = [f"tenant{number}" for number in range(1000)]
    for number, name in enumerate(names, 100):
        fleet.write(name, number)
    threads = Threads(fleet, names, rounds=10**9, renewed=NAMES)
    seconds = request.config.getoption("--slot-seconds")
    threads.run(seconds)
    print(f"{sum(threads.done)} batches of {len(names)} adapters, {threads.written} files replaced, {seconds} s")
    # A twentieth of what eight threads did on a machine of two busy cores: 97,011 batches in 300 s.
    assert sum(threads.done) > 16 * seconds and min(threads.done) > seconds and threads.written > 1
