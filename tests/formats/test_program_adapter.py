"""The files with the values of a program's adapter inputs: what is in them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import formats, plan
from lora_export.errors import InputRefused, MatchError
from lora_export.formats import program_adapter
from lora_export.formats.contract import AdapterPlace, Contract
from lora_export.formats.lora_changes import input_or_output_scales
from lora_export.formats.peft_keys import SCALE_IN_B
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Layout, TensorSpec
from lora_export.provenance import CONTRACT_KEY

A, B = np.float32([[1, 2, 3], [0, 5, 0]]), np.float32([[1, 0], [2, 0], [3, 1], [4, 0]])  # (rank, in), (out, rank)
NAMES = {module: [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"] for module in ("m.q", "m.v")}
PLACES = tuple(
    AdapterPlace(f"{module}.weight", *NAMES[module], (4, 3), "float32", "", max_rank=3, out_in=True) for module in NAMES
)
CONTRACT = Contract("ffffffff00", "", PLACES, required=True)
FR = Adapter("fr", "test", {"m.q": LoraPair(A, B, 0.5)}, sha256="ab" * 32)


def values_of(adapter: Adapter, strength: float = 1.0) -> dict[str, Any]:
    steps = program_adapter.plan_for(CONTRACT, [adapter], [strength], Path("m.pte"))
    return program_adapter.values(CONTRACT, steps, adapter.name)


def a_file(path: Path, values: dict[str, Any], *, base: str = CONTRACT.base) -> Path:
    program_adapter.write(path, values, replace(CONTRACT, base=base), sha256=FR.sha256)
    return path


def test_values_have_the_scale_in_b_and_zeros(tmp_path: Path) -> None:
    path = a_file(tmp_path / "fr.safetensors", values_of(FR, strength=3))
    written = load_file(path)
    (a, b), (other_a, other_b) = ([written[name] for name in names] for names in NAMES.values())
    np.testing.assert_array_equal(a, [*A, [0, 0, 0]])
    np.testing.assert_array_equal(b, np.concatenate([1.5 * B, np.zeros((4, 1))], axis=1))
    assert other_a.shape == (3, 3) and other_b.shape == (4, 3) and not other_a.any() and not other_b.any()
    found = program_adapter.read(path, CONTRACT, Path("m.pte"))
    assert list(found) == [*NAMES["m.q"], *NAMES["m.v"]]  # the order of the inputs
    assert all(np.array_equal(found[name], written[name]) for name in written)
    assert program_adapter.adapter_sha256(path) == FR.sha256


def test_the_file_is_an_adapter_of_the_same_change(tmp_path: Path) -> None:
    read = formats.load(a_file(tmp_path / "fr.safetensors", values_of(FR)))
    np.testing.assert_array_equal(read.pairs["m.q"].delta(), FR.pairs["m.q"].delta())
    assert not read.pairs["m.v"].delta().any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.pop(NAMES["m.v"][1]), r"m\.v\.lora_B\.weight: missing, the program takes float32"),
        (lambda values: values.update(more=A), "more: the program has no such input"),
        (lambda values: values.update({NAMES["m.q"][0]: A}), r"lora_A\.weight: float32 \[2, 3\], the program takes"),
        (lambda values: values.update({NAMES["m.q"][0]: A.astype(np.float16)}), r"float16 \[2, 3\], the program takes"),
        (lambda values: values[NAMES["m.q"][0]].__setitem__((0, 0), np.nan), "holds values that are not finite"),
    ],
)
def test_a_file_of_other_inputs_is_refused(change: Callable[[Any], object], says: str, tmp_path: Path) -> None:
    values = {name: value.copy() for name, value in values_of(FR).items()}
    change(values)
    with pytest.raises(InputRefused, match=says):
        program_adapter.read(a_file(tmp_path / "fr.safetensors", values), CONTRACT, Path("m.pte"))


Q, V = PLACES


@pytest.mark.parametrize(
    ("contract", "says"),
    [
        (replace(CONTRACT, places=()), "no inputs of one adapter that every run passes"),
        (replace(CONTRACT, required=False), "no inputs of one adapter that every run passes"),
        (
            replace(CONTRACT, places=(replace(Q, out_in=False), V)),
            r"m\.q\.weight: inputs other than A \(rank, in\) and B",
        ),
        (replace(CONTRACT, places=(Q, replace(V, max_rank=0))), r"m\.v\.weight: a rank of 0"),
        (replace(CONTRACT, places=(Q, replace(V, max_rank=1 << 40))), r"m\.v\.weight: a rank of 1099511627776"),
        (replace(CONTRACT, places=(Q, replace(V, dtype="float16"))), r"m\.v\.weight: inputs of float16"),
        (
            replace(CONTRACT, places=(Q, replace(V, b=V.a))),
            r"base_model\.model\.m\.v\.lora_A\.weight: 2 inputs have this name",
        ),
        (
            replace(CONTRACT, places=(Q, replace(V, a=Q.a))),
            r"base_model\.model\.m\.q\.lora_A\.weight: 2 inputs have this name",
        ),
    ],
)
def test_a_record_that_no_export_makes_is_refused(contract: Contract, says: str) -> None:
    assert program_adapter.contract_of(Path("m.pte"), {CONTRACT_KEY: str(CONTRACT)}) == CONTRACT
    with pytest.raises(InputRefused, match=rf"m\.pte: its record of adapter inputs .* is damaged:\n  {says}"):
        program_adapter.contract_of(Path("m.pte"), {CONTRACT_KEY: str(contract)})


def test_a_file_for_another_base_is_refused(tmp_path: Path) -> None:
    path = a_file(tmp_path / "fr.safetensors", values_of(FR), base="00ff")
    with pytest.raises(InputRefused, match="made for another base \\(00ff…, the program has ffffffff00…\\)"):
        program_adapter.read(path, CONTRACT, Path("m.pte"))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"format": "pt"}, "it is a trained adapter, whose scale is not in B"),  # PEFT's own file: the same inputs
        ({"format": "pt", **SCALE_IN_B}, "it does not state for which base it was made"),  # OpenVINO's
    ],
)
def test_a_file_of_the_same_tensors_is_refused_without_its_header(
    header: dict[str, str], says: str, tmp_path: Path
) -> None:
    save_file(values_of(FR), tmp_path / "adapter_model.safetensors", header)
    with pytest.raises(InputRefused, match=f"{says}\nMake one .* from the trained adapter: .*convert"):
        program_adapter.read(tmp_path / "adapter_model.safetensors", CONTRACT, Path("m.pte"))


DORA = LoraPair(A, B, 1.0, magnitude=np.ones(4, np.float32))
PAIR = FR.pairs["m.q"]
SCALING = input_or_output_scales(np.float32([2, 3, 4, 5]), np.zeros(1))  # of outputs
RANK_4 = r"the program has a fixed rank \(max_rank=\), .*:\n  fr, m\.q\.weight: rank 4 > 3"


@pytest.mark.parametrize(
    ("adapters", "error", "says"),
    [
        ([FR, replace(FR, name="de")], InputRefused, "takes one adapter at a time, and not 2"),
        ([replace(FR, pairs={"m.k": PAIR})], MatchError, "the program takes no adapter at"),
        ([replace(FR, pairs={"m.q": DORA})], InputRefused, r"fr, m\.q\.weight: DoRA, whose factor follows"),
        ([replace(FR, invocation_tokens=(1,))], InputRefused, "acts on some tokens alone"),
        (
            [replace(FR, biases={"m.q": np.ones(4, np.float32)})],
            InputRefused,
            r"program runs; these cannot:\n  fr, m\.q: a change of a bias",
        ),
        ([replace(FR, pairs={"m.q": SCALING})], InputRefused, r"program runs; these cannot:\n  fr, m\.q: a change by"),
        ([replace(FR, pairs={"m.q": LoraPair(A[[0] * 4], B[:, [0] * 4], 1.0)})], InputRefused, RANK_4),
    ],
)
def test_what_is_no_input_is_refused_by_name(adapters: list[Adapter], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        steps = program_adapter.plan_for(CONTRACT, adapters, [1.0] * len(adapters), Path("m.pte"))
        program_adapter.values(CONTRACT, steps, "fr")


def test_a_pair_of_an_embedding_is_refused_by_name() -> None:
    pair = replace(PAIR, embedding=True)
    steps = plan.make([replace(FR, pairs={"e": pair})], [TensorSpec("e.weight", (3, 4), "float32", Layout.EMBEDDING)])
    with pytest.raises(InputRefused, match=r"fr, e\.weight: a pair of an embedding"):
        program_adapter.refuse_kinds(steps)
