"""The options of an ONNX export, and its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.api.onnx_request import OnnxRequest, OnnxResult, adapter_file, check_adapters
from lora_export.api.publish import ExportProofs
from lora_export.errors import InputRefused, MatchError, OutputFailed
from lora_export.lora import Adapter, LoraPair
from lora_export.verification.proof import Proof
from support.api import Recorder
from support.plans import A, B, adapter, holding, matrix, pair
from support.verdicts import SAME


def options(*adapters: Adapter, lora: str = "merged", **fields: Any) -> OnnxRequest:
    return OnnxRequest("base", Path(fields.pop("output", "m.onnx")), lora=lora, adapters=adapters, **fields)


def test_each_adapter_has_a_strength() -> None:
    two = adapter("one", fc=pair()), adapter("two", fc=pair())
    assert options(*two).strengths == (1.0, 1.0) and options(*two, weights=[2.0, 0.5]).strengths == [2.0, 0.5]


@pytest.mark.parametrize(
    ("target", "targets"),
    [
        (None, None),
        ("all-linear", "all-linear"),
        ("query,value", ["query", "value"]),
        ("query,", ["query"]),
        (["query", ""], ["query"]),
    ],
)
def test_targets_are_endings_or_all_linear_layers(target: Any, targets: Any) -> None:
    assert options(target=target).targets == targets


def test_only_swapped_adapters_may_meet_on_a_weight_with_dora() -> None:
    scaled = LoraPair(a=np.array(A), b=np.array(B), scale=1.0, magnitude=np.array([1, 2]))
    two = [adapter(name, fc=scaled) for name in ("one", "two")]
    with pytest.raises(MatchError, match="DoRA rescales the whole sum"):
        options(*two).plan([matrix("fc.weight")])
    plan = options(*two, lora="inputs", weights=[2.0, 3.0]).plan([matrix("fc.weight")])
    assert [term.strength for term in plan.steps[0].terms] == [2.0, 3.0]
    assert [options(lora=lora).is_swapped for lora in ("merged", "nodes", "inputs", "rows")] == [
        False, False, True, True,
    ]  # fmt: skip


def test_an_adapters_file_has_its_name() -> None:
    fr = adapter("fr", fc=pair())
    assert adapter_file(fr, options(fr)) == "fr.onnx_adapter"
    one_of_three = options(fr, task="text2text-generation", output="out/decoder_model.onnx")
    assert adapter_file(fr, one_of_three) == "fr.decoder_model.onnx_adapter"
    for name in (".hidden", "../fr", "a/b"):
        with pytest.raises(InputRefused, match=r'cannot be the name of a file\. Name the adapter: adapters="NAME='):
            adapter_file(adapter(name, fc=pair()), options())


def test_names_matter_only_where_they_are_files() -> None:
    hidden = adapter(".hidden", fc=pair())
    for lora in ("merged", "nodes", "rows"):
        check_adapters(options(hidden, lora=lora))
    with pytest.raises(InputRefused, match="cannot be the name of a file"):
        check_adapters(options(hidden, lora="inputs"))


@pytest.mark.parametrize(("lora", "task"), [("inputs", None), ("rows", "text2text-generation")])
def test_whole_tensors_cannot_be_swapped(lora: str, task: str | None) -> None:
    head = holding("fr", pairs={"fc": pair()}, replaced={"head.weight": np.ones((2, 3), np.float32)})
    check_adapters(options(head, lora="merged", task=task))
    with pytest.raises(InputRefused, match="head"):
        check_adapters(options(head, lora=lora, task=task))
    check_adapters(options(head, lora=lora, task=task, ignore_head=True))


def test_more_adapters_than_slots_are_refused_before_the_export() -> None:
    three = [adapter(name, fc=pair()) for name in ("one", "two", "three")]
    for fitting in (options(*three, lora="slots", slots=3), options(*three, lora="slots", slots=2, verify=False)):
        check_adapters(fitting)
    with pytest.raises(InputRefused, match=r"3 adapters for 2 slots: .*slots=3.*convert"):
        check_adapters(options(*three, lora="slots", slots=2))


def test_rows_may_choose_heads_and_no_biases() -> None:
    replaced = {"head.weight": np.ones((2, 3), np.float32), "fc.weight": np.ones((2, 3), np.float32)}
    head = holding("fr", pairs={"fc": pair()}, replaced=replaced)
    taken = options(head, lora="rows")
    check_adapters(taken)
    assert taken.has_own_heads and not options(head, lora="rows", ignore_head=True).has_own_heads
    assert not options(head, lora="inputs").has_own_heads
    (without,) = taken.without_own_heads
    assert without.replaced.keys() == {"fc.weight"} and options(head, lora="inputs").without_own_heads == [head]
    shifted = holding("fr", pairs={"fc": pair()}, replaced=replaced, biases={"fc": np.ones(2, np.float32)})
    with pytest.raises(InputRefused, match="fr, fc: a change of a bias"):
        check_adapters(options(shifted, lora="rows"))


def test_nothing_is_published_when_the_work_fails(tmp_path: Path) -> None:
    seen = Recorder()
    wanted = options(output=tmp_path / "m.onnx", **seen.callbacks)
    with pytest.raises(ZeroDivisionError), wanted.staged([]) as folder:
        (folder / "m.onnx").write_bytes(b"new")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with wanted.staged([]) as folder:
        (folder / "m.onnx").write_bytes(b"new")
    assert (tmp_path / "m.onnx").read_bytes() == b"new"
    with pytest.raises(OutputFailed, match="exists already"), wanted.staged([]):
        pass
    wanted.stage("writing")
    assert seen.stages == ["writing"]


def test_the_output_may_not_be_an_input(tmp_path: Path) -> None:
    (tmp_path / "fr").mkdir()
    wanted = options(output=tmp_path / "fr" / "m.onnx", sources=[tmp_path / "fr"])
    with pytest.raises(OutputFailed, match="inside the input"), wanted.staged([]):
        pass


def test_the_proof_of_a_result_is_that_of_the_whole_graph() -> None:
    whole = Proof(SAME, None, {})
    assert OnnxResult(Path("m.onnx"), (), ExportProofs(whole), None).proof is whole
    assert OnnxResult(Path("m.onnx"), (), None, None).proof is None
