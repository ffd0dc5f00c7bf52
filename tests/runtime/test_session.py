"""A session with adapters by name: what each call computes, and where onnxruntime alone would fail silently."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from conftest import why_no_cuda
from lora_export import Session, plan
from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import Contract
from lora_export.formats.onnx_adapter import array_of_ort_value
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_inputs import checked_contract, contract_dora_factors, insert_inputs
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import LoraPair
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.storage import hashes
from lora_export.weights.checkpoint import open_checkpoint
from support.graphs import a_graph, an_adapter, quantised
from support.handmade import base_file
from support.onnx_adapters import shortened

BODY = """
g ({dtype}[N,3] x) => ({dtype}[N,2] y)
<{dtype}[3,2] m.weight = {{1,4,2,5,3,6}}, {dtype}[2,2] n.weight = {{1,0,2,1}}>
{{ [m] h = MatMul(x, m.weight)
   [n] y = MatMul(h, n.weight) }}"""
M, N = np.float32([[1, 4], [2, 5], [3, 6]]), np.float32([[1, 0], [2, 1]])  # (in, out)
X = np.float32([[1, 1, 2], [0, 3, 1]])
# A (in, rank) and B (rank, out): adapter `one` is at the first weight, `two` at both, with other ranks
ONE = {"m.lora_A.weight": np.float32([[1], [0], [-1]]), "m.lora_B.weight": np.float32([[2, 4]])}
TWO = {
    "m.lora_A.weight": np.float32([[1, 0], [0, 1], [1, 1]]),
    "m.lora_B.weight": np.float32([[1, 0], [3, -1]]),
    "n.lora_A.weight": np.float32([[1], [2]]),
    "n.lora_B.weight": np.float32([[0, 5]]),
}


def expected(adapter: dict[str, NDArray[Any]], factor: float = 1.0) -> NDArray[np.float32]:
    change = {
        name: factor * adapter[f"{name}.lora_A.weight"] @ adapter[f"{name}.lora_B.weight"]
        if f"{name}.lora_A.weight" in adapter
        else 0
        for name in "mn"
    }
    return X @ (M + change["m"]) @ (N + change["n"])


def a_model(folder: Path, *, dtype: str = "float32", **replacing: str) -> tuple[Path, Contract]:
    body = BODY.format(dtype="float")
    for before, after in replacing.items():
        body = body.replace(before, after)
    model = a_graph(body)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
    for value in model.graph.initializers.values():
        value.const_value = ir.Tensor(value.const_value.numpy().astype(value.dtype.numpy()), name=value.name)
    contract = insert_inputs(model, find_sites(model), ["m.weight", "n.weight"])
    save_graph(model, folder, "model.onnx")
    return folder / "model.onnx", contract


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path, contract = a_model(tmp_path)
    onnx_adapter.write(tmp_path / "one.onnx_adapter", ONE, contract, sha256="1")
    onnx_adapter.write(tmp_path / "two.onnx_adapter", TWO, contract, sha256="2")
    return path


@pytest.fixture
def session(model: Path) -> Session:
    return Session(model, {name: model.parent / f"{name}.onnx_adapter" for name in ("one", "two")})


def test_missing_input_is_named(model: Path) -> None:
    with pytest.raises(InputRefused, match=r"model.onnx also needs x$"):
        Session(model).run({})


def test_each_run_uses_its_own_adapter_or_the_base(session: Session) -> None:
    for _ in range(2):
        assert np.array_equal(session.run({"x": X})["y"], X @ M @ N)
        assert np.array_equal(session.run({"x": X}, adapter="one")["y"], expected(ONE))
        assert np.array_equal(session.run({"x": X}, adapter="two")["y"], expected(TWO))
    assert session.adapters == ("one", "two")
    assert not np.array_equal(expected(ONE), expected(TWO))


def test_open_session_of_the_graph_is_used_as_it_is(model: Path) -> None:
    opened = Session(model).session
    session = Session(model, {"one": model.parent / "one.onnx_adapter"}, session=opened)
    assert session.session is opened
    assert np.array_equal(session.run({"x": X}, adapter="one")["y"], expected(ONE))


def test_loaded_adapter_outlives_its_file(model: Path) -> None:
    # onnxruntime's own LoraAdapter, once its object is gone, makes run() compute the base.
    session = Session(model)
    session.load("one", model.parent / "one.onnx_adapter")
    (model.parent / "one.onnx_adapter").write_bytes(b"")
    gc.collect()
    for _ in range(50):
        assert np.array_equal(session.run({"x": X}, adapter="one")["y"], expected(ONE))


def test_binding_uses_the_adapter_bound_last(session: Session) -> None:
    # onnxruntime's run_with_iobinding ignores active adapters.
    binding = session.io_binding(adapter="one")
    binding.bind_cpu_input("x", X)
    binding.bind_output("y", "cpu")
    for adapter, output in [("one", expected(ONE)), ("two", expected(TWO)), (None, X @ M @ N), ("one", expected(ONE))]:
        session.bind(binding, adapter=adapter)
        session.run_with_iobinding(binding)
        assert np.array_equal(binding.copy_outputs_to_cpu()[0], output), adapter


def test_binding_holds_an_unloaded_adapter(session: Session) -> None:
    binding = session.io_binding(adapter="two")
    binding.bind_cpu_input("x", X)
    binding.bind_output("y", "cpu")
    session.unload("two")
    gc.collect()
    _ = [np.full((64, 64), 7, np.float32) for _ in range(50)]  # overwrites the memory if it was freed
    session.run_with_iobinding(binding)
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], expected(TWO))
    with pytest.raises(InputRefused, match="no adapter 'two' is loaded; loaded: one"):
        session.run({"x": X}, adapter="two")


def test_mix_is_the_weighted_sum(session: Session) -> None:
    session.mix("both", {"one": 2.0, "two": -0.5})
    both = {
        "m.lora_A.weight": np.concatenate([ONE["m.lora_A.weight"], TWO["m.lora_A.weight"]], axis=1),
        "m.lora_B.weight": np.concatenate([2 * ONE["m.lora_B.weight"], -0.5 * TWO["m.lora_B.weight"]]),
        "n.lora_A.weight": TWO["n.lora_A.weight"],
        "n.lora_B.weight": -0.5 * TWO["n.lora_B.weight"],
    }
    assert np.array_equal(session.run({"x": X}, adapter="both")["y"], expected(both))
    assert np.array_equal(session.run({"x": X}, adapter="two")["y"], expected(TWO))


@pytest.mark.parametrize("several", [["one", "two"], {"one": 1.0}, ("one",)])
def test_several_adapters_in_one_run_are_refused_with_a_remedy(session: Session, several: Any) -> None:
    # Of two active adapters with the same names onnxruntime takes one.
    with pytest.raises(InputRefused, match=r"a run takes the name of one adapter, .*`mix` combines several"):
        session.run({"x": X}, adapter=several)


@pytest.mark.parametrize("strengths", [{}, {"one": float("nan")}, {"one": 1.0, "three": 1.0}])
def test_mix_of_nothing_or_of_unknown_adapters_is_refused(session: Session, strengths: dict[str, float]) -> None:
    with pytest.raises(InputRefused, match=r"a mix needs adapters and finite strengths|no adapter 'three' is loaded"):
        session.mix("both", strengths)
    assert session.adapters == ("one", "two")


def test_nearest_adapter_name_is_suggested(session: Session) -> None:
    with pytest.raises(InputRefused, match="no adapter 'ome' is loaded; the nearest name is 'one'"):
        session.run({"x": X}, adapter="ome")


def test_partial_adapter_is_refused_and_the_loaded_one_remains(session: Session, tmp_path: Path) -> None:
    # A alone would compute the base without an error.
    only_a = {"m.lora_A.weight": ONE["m.lora_A.weight"]}
    onnx_adapter.write(tmp_path / "half", only_a, session.contract, sha256="1")
    with pytest.raises(InputRefused, match=r"m.lora_B.weight: missing, though m.lora_A.weight is present"):
        session.load("one", tmp_path / "half")
    assert np.array_equal(session.run({"x": X}, adapter="one")["y"], expected(ONE))


def test_adapter_of_another_base_is_refused(session: Session, tmp_path: Path) -> None:
    # Names, shapes and types are the same; onnxruntime itself never looks at the version.
    other = tmp_path / "other"
    other.mkdir()
    _, contract = a_model(other, **{"{1,0,2,1}": "{1,0,2,2}"})
    onnx_adapter.write(other / "x", ONE, contract, sha256="1")
    with pytest.raises(InputRefused, match="it was made for another base"):
        session.load("x", other / "x")


def test_wrong_dtype_is_refused_when_loaded(session: Session, tmp_path: Path) -> None:
    halves = {name: array.astype(np.float16) for name, array in ONE.items()}
    onnx_adapter.write(tmp_path / "x", halves, session.contract, sha256="1")
    with pytest.raises(InputRefused, match=r"m.lora_A.weight: tensor\(float16\), the graph takes float32"):
        Session(session.model, {"x": tmp_path / "x"})


def test_damaged_file_is_refused(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx_adapter"
    path.write_bytes(shortened(path.read_bytes()))
    with pytest.raises(InputRefused, match="damaged"):
        session.load("x", path)


def test_flipped_bit_and_infinite_factor_are_refused(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx_adapter"
    before = session.run({"x": X}, adapter="one")["y"]
    data = bytearray(path.read_bytes())
    data[data.index(ONE["m.lora_B.weight"].tobytes()) + 2] ^= 1  # the lowest bits of a factor's fraction
    path.write_bytes(data)
    with pytest.raises(InputRefused, match="is damaged: its contents are not those that were written"):
        session.load("one", path)
    infinite = {**ONE, "m.lora_B.weight": np.float32([[2, np.inf]])}
    onnx_adapter.write(path, infinite, session.contract, sha256="1")
    with pytest.raises(InputRefused, match=r"m\.lora_B\.weight: 1 of 2 values are not finite"):
        session.load("one", path)
    assert np.array_equal(session.run({"x": X}, adapter="one")["y"], before)


def test_file_without_a_hash_is_loaded(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx_adapter"
    path.write_bytes(path.read_bytes()[: -hashes.ENDING])  # as earlier versions wrote it
    session.load("old", path)
    assert np.array_equal(session.run({"x": X}, adapter="old")["y"], expected(ONE))


def test_float16_adapters_are_switched_and_mixed(tmp_path: Path) -> None:
    path, contract = a_model(tmp_path, dtype="float16")
    arrays = {name: array.astype(np.float16) for name, array in TWO.items()}
    onnx_adapter.write(tmp_path / "x", arrays, contract, sha256="1")
    session = Session(path, {"x": tmp_path / "x"})
    assert np.array_equal(session.run({"x": X.astype(np.float16)}, adapter="x")["y"], expected(TWO))
    session.mix("twice", {"x": 2.0})
    assert np.array_equal(session.run({"x": X.astype(np.float16)}, adapter="twice")["y"], expected(TWO, 2.0))
    with pytest.raises(InputRefused, match=r"loud, m.weight: 3 values of m.lora_B.weight .* float16 is 65504"):
        session.mix("loud", {"x": 7e4})


def test_bfloat16_without_a_kernel_is_refused_with_the_reason(tmp_path: Path) -> None:
    path, contract = a_model(tmp_path, dtype="bfloat16")
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in TWO.items()}
    onnx_adapter.write(tmp_path / "x", arrays, contract, sha256="1")
    file = onnx_adapter.read(tmp_path / "x")
    onnx_adapter.refuse_misfits(file, contract, source="x", graph=path)  # raises for any misfit
    assert {name: array_of_ort_value(value).tobytes() for name, value in file.values.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    with pytest.raises(RuntimeRefused, match="NOT_IMPLEMENTED"):  # as of 1.31 the CPU multiplies nothing in it
        Session(path, {"x": tmp_path / "x"})


def test_graph_that_takes_no_adapters_is_refused(tmp_path: Path) -> None:
    save_graph(a_graph(BODY.format(dtype="float")), tmp_path, "plain.onnx")
    with pytest.raises(InputRefused, match="does not record where it takes adapters"):
        Session(tmp_path / "plain.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    with pytest.raises(RuntimeRefused, match="onnxruntime refused"):
        Session(tmp_path / "noise.onnx")


def test_graph_without_its_adapter_inputs_is_refused(model: Path) -> None:
    graph = load_graph(model)
    del graph.graph.inputs[1:]
    save_graph(graph, model.parent, "folded.onnx")
    with pytest.raises(InputRefused, match=r"has lost 4 of its adapter inputs, the first of them m.lora_A.weight"):
        Session(model.parent / "folded.onnx")


@pytest.mark.parametrize("size", [4, 10**13])
def test_metadata_with_other_sizes_is_refused_before_allocation(tmp_path: Path, size: int) -> None:
    path = files_of(tmp_path)
    graph = load_graph(path)
    record = graph.metadata_props[CONTRACT_KEY]
    assert '"shape": [2, 3]' in record
    graph.metadata_props[CONTRACT_KEY] = record.replace('"shape": [2, 3]', f'"shape": [{size}, 3]')
    save_graph(graph, tmp_path, "other.onnx")
    message = rf"other.onnx: its metadata gives m.weight the shape \[{size}, 3\], which does not fit the input m.lora_"
    with pytest.raises(InputRefused, match=message):
        Session(tmp_path / "other.onnx")


def test_adapter_inputs_and_unknown_inputs_are_refused_as_feeds(session: Session) -> None:
    with pytest.raises(InputRefused, match=r"m.lora_A.weight are inputs of an adapter"):
        session.run({"x": X, "m.lora_A.weight": ONE["m.lora_A.weight"]})
    with pytest.raises(RuntimeRefused, match="onnxruntime refused"):
        session.run({"x": X, "z": X})


def test_feeds_larger_than_the_graph_was_made_for_are_refused(session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(session, "longest", {"N": 3})
    session.run({"x": np.repeat(X[:1], 3, axis=0)})
    with pytest.raises(InputRefused, match="was made for sizes of up to 3 in N, and this run has 4"):
        session.run({"x": np.repeat(X, 2, axis=0)})


def test_feeds_may_be_ort_values_and_outputs_chosen(session: Session) -> None:
    value = onnxruntime.OrtValue.ortvalue_from_numpy(X)
    assert list(session.run({"x": value}, adapter="one", outputs=["y"])) == ["y"]
    for same in (np.repeat(X, 2, axis=1)[:, ::2], X.astype(">f4")):
        assert np.array_equal(session.run({"x": same}, adapter="one")["y"], expected(ONE))
    with pytest.raises(RuntimeRefused, match=r"Unexpected input data type. Actual: \(tensor\(bfloat16\)\)"):
        session.run({"x": X.astype(ml_dtypes.bfloat16)})


def test_threads_do_not_share_adapters(session: Session) -> None:
    wrong: list[str] = []

    def work(adapter: str | None, output: NDArray[np.float32]) -> None:
        for _ in range(100):
            if not np.array_equal(session.run({"x": X}, adapter=adapter)["y"], output):
                wrong.append(str(adapter))

    cases = [(None, X @ M @ N), ("one", expected(ONE)), ("two", expected(TWO))]
    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_missing_or_unknown_provider_is_reported(model: Path) -> None:
    if not why_no_cuda():
        pytest.skip("this machine has a GPU: the refusal cannot be seen here")
    with pytest.raises(EnvironmentLacking, match="CUDAExecutionProvider") as refusal:
        Session(model, provider="cuda")
    assert refusal.value.exit_code == 6
    with pytest.raises(InputRefused, match="unknown provider 'tpu'"):
        Session(model, provider="tpu")


@pytest.mark.cuda
def test_adapters_are_stored_on_the_gpu(model: Path) -> None:
    session = Session(model, {"two": model.parent / "two.onnx_adapter"}, provider="cuda")
    assert {value.device_name() for value in session._loaded["two"].values()} == {"cuda"}
    np.testing.assert_allclose(session.run({"x": X}, adapter="two")["y"], expected(TWO), rtol=1e-2)
    session.mix("half", {"two": 0.5})
    np.testing.assert_allclose(session.run({"x": X}, adapter="half")["y"], expected(TWO, 0.5), rtol=1e-2)


def test_session_imports_neither_torch_nor_onnx(session: Session, tmp_path: Path) -> None:
    code = (
        "import sys, numpy, lora_export\n"
        "s = lora_export.Session(sys.argv[1], {'one': sys.argv[2]})\n"
        "print(s.run({'x': numpy.ones((1, 3), 'f')}, adapter='one')['y'].shape)\n"
        "assert not {'torch', 'onnx', 'onnx_ir', 'onnxscript'} & set(sys.modules), sys.modules.keys()"
    )
    words = [sys.executable, "-c", code, str(session.model), str(tmp_path / "one.onnx_adapter")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "(1, 2)\n"), done.stderr


# --- DoRA, embeddings, convolutions, packed and quantised weights ---

EVERYTHING = """
g (int64[N] words, float[N,2,L] x) => (float[N,2] y, float[N,3,M] z)
<float[5,3] e.weight = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6}, float[2,3] m.weight = {1,2,3,4,5,6},
 float[3,2,1] c.weight = {1,2,3,4,5,6}>
{ h = Gather(e.weight, words)
  y = Gemm <transB = 1> (h, m.weight)
  z = Conv(x, c.weight) }"""
FED = {"words": np.array([4, 0, -1]), "x": np.arange(18, dtype=np.float32).reshape(3, 2, 3)}
TABLE = np.float64([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3], [4, 5, 6]])
DENSE, KERNEL = np.float64([[1, 2, 3], [4, 5, 6]]), np.float64([[1, 2], [3, 4], [5, 6]])  # (out, in)
PAIRS = {
    "e": LoraPair(a=[[1, 0, 2, 0, -1]], b=[[1], [2], [0]], scale=1.0, magnitude=[3, -1, 2], embedding=True),
    "m": LoraPair(a=[[1, 0, 1], [0, 1, 0]], b=[[1, 0], [0, 2]], scale=0.5, magnitude=[4, 0.5]),
    "c": LoraPair(a=np.float32([[1, -1]])[..., None], b=np.float32([[1], [0], [2]])[..., None], scale=1.0,
                  magnitude=[1, 7, 2]),
}  # fmt: skip


def changed(weight: NDArray[np.float64], pair: LoraPair | None) -> NDArray[np.float64]:
    if pair is None:
        return weight
    total = weight + pair.delta().reshape(weight.shape)
    if pair.magnitude is None:
        return total
    return total * (pair.magnitude / np.linalg.norm(total, axis=1))[:, None]


def computed(pairs: Mapping[str, LoraPair]) -> dict[str, NDArray[np.float64]]:
    table = changed(TABLE.T, pairs.get("e")).T
    y = table[FED["words"]] @ changed(DENSE, pairs.get("m")).T
    return {"y": y, "z": np.einsum("oi,nil->nol", changed(KERNEL, pairs.get("c")), FED["x"])}


def files_of(folder: Path, **adapters: Mapping[str, LoraPair]) -> Path:
    """A graph that takes DoRA at every weight, and adapters for it."""
    graph = a_graph(EVERYTHING)
    arrays = [an_adapter(pairs, name=name) for name, pairs in adapters.items()]
    found = find_sites(graph)
    contract = insert_inputs(graph, found, list(found.by_name), dora=found.by_name)
    for adapter in arrays:
        steps = plan.make([adapter], found.specs)
        factors = contract_dora_factors(graph, contract, steps, adapter.name)
        arrays = onnx_adapter.input_values(contract, steps, adapter.name, factors)
        onnx_adapter.write(folder / f"{adapter.name}.onnx_adapter", arrays, contract, sha256="1")
    save_graph(graph, folder, "model.onnx")
    return folder / "model.onnx"


def loaded(folder: Path, **adapters: Mapping[str, LoraPair]) -> Session:
    path = files_of(folder, **adapters)
    return Session(path, {name: folder / f"{name}.onnx_adapter" for name in adapters})


def without_dora(*modules: str) -> dict[str, LoraPair]:
    return {module: dataclasses.replace(PAIRS[module], magnitude=None) for module in modules}


def agree(output: Mapping[str, NDArray[Any]], pairs: Mapping[str, LoraPair]) -> None:
    for name, value in computed(pairs).items():
        np.testing.assert_allclose(output[name], value, rtol=1e-5, atol=1e-5)


def test_dora_embeddings_and_convolutions_are_switched(tmp_path: Path) -> None:
    every, some = PAIRS, {**without_dora("e"), "c": PAIRS["c"]}
    session = loaded(tmp_path, every=every, some=some)
    for _ in range(2):
        agree(session.run(FED, adapter="every"), every)
        agree(session.run(FED, adapter="some"), some)
        agree(session.run(FED), {})
    assert np.abs(computed(every)["y"] - computed(without_dora("e", "m"))["y"]).max() > 1  # the factors matter


def test_binding_switches_doras_factors_with_the_adapter(tmp_path: Path) -> None:
    session = loaded(tmp_path, every=PAIRS)
    binding = session.io_binding(adapter="every")
    for name, value in FED.items():
        binding.bind_cpu_input(name, value)
    for name in ("y", "z"):
        binding.bind_output(name, "cpu")
    for adapter, pairs in [("every", PAIRS), (None, {}), ("every", PAIRS)]:
        session.bind(binding, adapter=adapter)
        session.run_with_iobinding(binding)
        agree(dict(zip(("y", "z"), binding.copy_outputs_to_cpu(), strict=True)), pairs)


def test_adapter_without_a_dora_factor_is_refused(tmp_path: Path) -> None:
    # onnxruntime would compute the adapter without DoRA, without an error.
    session = loaded(tmp_path, every=PAIRS)
    file = onnx_adapter.read(tmp_path / "every.onnx_adapter")
    arrays = {name: onnx_adapter.array_of_ort_value(value) for name, value in file.values.items()}
    del arrays["m.lora_magnitude_vector.weight"]
    arrays["c.lora_magnitude_vector.weight"] = arrays["c.lora_magnitude_vector.weight"].reshape(-1)
    onnx_adapter.write(tmp_path / "x", arrays, session.contract, sha256="1")
    with pytest.raises(InputRefused) as refusal:
        session.load("x", tmp_path / "x")
    assert "m.lora_magnitude_vector.weight: missing, though m.lora_A.weight is present" in str(refusal.value)
    assert "c.lora_magnitude_vector.weight: [3], the graph takes [3, 1]" in str(refusal.value)
    assert session.adapters == ("every",)


def test_mix_concatenates_the_ranks_of_every_kind_of_layer(tmp_path: Path) -> None:
    session = loaded(tmp_path, one=without_dora("e", "c"), two=without_dora("m", "c"))
    session.mix("both", {"one": 2.0, "two": -1.0})
    scaled = {module: dataclasses.replace(pair, scale=2 * pair.scale) for module, pair in without_dora("e").items()}
    scaled |= {module: dataclasses.replace(pair, scale=-pair.scale) for module, pair in without_dora("m").items()}
    agree(session.run(FED, adapter="both"), scaled | without_dora("c"))  # 2 - 1 times


@pytest.mark.parametrize("strengths", [{"dora": 1.0, "plain": 1.0}, {"dora": 0.5}])
def test_dora_is_not_mixed_and_not_scaled(tmp_path: Path, strengths: dict[str, float]) -> None:
    session = loaded(tmp_path, dora={"m": PAIRS["m"]}, plain=without_dora("e", "m"))
    with pytest.raises(InputRefused, match=r"both: an adapter uses DoRA or IA3 at m.weight. It cannot be mixed"):
        session.mix("both", strengths)
    assert session.adapters == ("dora", "plain")


def test_dora_is_mixed_with_adapters_of_other_weights(tmp_path: Path) -> None:
    session = loaded(tmp_path, dora={"m": PAIRS["m"]}, plain=without_dora("e"))
    session.mix("both", {"dora": 1.0, "plain": -3.0})
    elsewhere = {"e": dataclasses.replace(PAIRS["e"], magnitude=None, scale=-3.0)}
    agree(session.run(FED, adapter="both"), {"m": PAIRS["m"], **elsewhere})


@pytest.mark.parametrize("of_inputs", [False, True])
def test_factors_of_ia3_are_not_mixed_and_not_scaled(of_inputs: bool, tmp_path: Path) -> None:
    model = a_graph(BODY.format(dtype="float"))
    kinds: dict[str, Any] = {"scaled" if of_inputs else "dora": ["m.weight"]}
    contract = insert_inputs(model, find_sites(model), ["m.weight"], **kinds)
    save_graph(model, tmp_path, "model.onnx")
    (place,) = contract.places
    factors, values = np.arange(2, 2 + M.shape[0 if of_inputs else 1]).astype(np.float32), place.zeros()
    onnx_adapter.write(tmp_path / "x", values | {place.scale or place.factor: factors}, contract, sha256="1")
    session = Session(tmp_path / "model.onnx", {"x": tmp_path / "x"})
    session.mix("same", {"x": 1.0})
    weight = factors[:, None] * M if of_inputs else M * factors
    for name in ("x", "same"):
        assert np.array_equal(session.run({"x": X}, adapter=name)["y"], X @ weight @ N)
    with pytest.raises(InputRefused, match=r"half: an adapter uses DoRA or IA3 at m.weight"):
        session.mix("half", {"x": 0.5})


def test_adapter_of_one_block_in_packed_four_bit_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(4, 32)).astype(np.float32) for name in ("q", "k")}
    packed = np.concatenate([*weights.values()])
    numbers = ",".join(map(str, packed.T.flat))
    graph = quantised(a_graph(f"""
        g (float[N,32] x) => (float[N,8] y) <float[32,8] W = {{{numbers}}}>
        {{ [n] y = MatMul(x, W) }}"""))  # fmt: skip
    checkpoint = base_file(tmp_path / "base.safetensors", {f"{name}.weight": one for name, one in weights.items()})
    found = find_sites(graph, open_checkpoint(checkpoint))
    k = an_adapter({"k": LoraPair(a=rng.normal(size=(2, 32)), b=rng.normal(size=(4, 2)), scale=1.0)})
    contract, steps = insert_inputs(graph, found, list(found.by_name)), plan.make([k], found.specs)
    onnx_adapter.write(tmp_path / "k", onnx_adapter.input_values(contract, steps, k.name), contract, sha256="1")
    save_graph(graph, tmp_path, "model.onnx")
    session, x = Session(tmp_path / "model.onnx", {"k": tmp_path / "k"}), rng.normal(size=(5, 32)).astype(np.float32)
    off, on = session.run({"x": x})["y"], session.run({"x": x}, adapter="k")["y"]
    assert on[:, :4].tobytes() == off[:, :4].tobytes()
    np.testing.assert_allclose(on[:, 4:], off[:, 4:] + x @ k.pairs["k"].delta().T, rtol=1e-4, atol=1e-4)


def test_a_mix_in_a_graph_of_fixed_rank_drops_the_padding(tmp_path: Path) -> None:
    model = a_graph(BODY.format(dtype="float"))
    contract = insert_inputs(model, find_sites(model), ["m.weight", "n.weight"], max_rank=3)
    save_graph(model, tmp_path, "model.onnx")
    places = contract.inputs
    for name, adapter in (("one", ONE), ("two", TWO)):
        padded = {key: places[key].padded(key, array) for key, array in adapter.items()}
        onnx_adapter.write(tmp_path / name, padded, contract, sha256="1")
    session = Session(tmp_path / "model.onnx", {name: tmp_path / name for name in ("one", "two")})
    session.mix("sum", {"one": 1.0, "two": 1.0})
    assert np.array_equal(session.run({"x": X}, adapter="one")["y"], expected(ONE))
    change = sum(each["m.lora_A.weight"] @ each["m.lora_B.weight"] for each in (ONE, TWO))
    second = N + TWO["n.lora_A.weight"] @ TWO["n.lora_B.weight"]
    assert np.array_equal(session.run({"x": X}, adapter="sum")["y"], X @ (M + change) @ second)
    with pytest.raises(InputRefused, match=r"more, m.weight: the mix has the rank 5, and the graph takes at most 3"):
        session.mix("more", {"sum": 1.0, "two": 1.0})
    assert session.adapters == ("one", "two", "sum")


def test_an_adapter_of_another_rank_than_the_fixed_one_is_refused(tmp_path: Path) -> None:
    model = a_graph(BODY.format(dtype="float"))
    contract = insert_inputs(model, find_sites(model), ["m.weight"], max_rank=2)
    save_graph(model, tmp_path, "model.onnx")
    onnx_adapter.write(tmp_path / "one", ONE, contract, sha256="1")
    with pytest.raises(InputRefused, match=r"m.lora_A.weight: \[3, 1\], the graph takes \[3, 2\]"):
        Session(tmp_path / "model.onnx", {"one": tmp_path / "one"})


@pytest.mark.parametrize("has_strengths", [False, True])
def test_a_graph_of_required_inputs_runs_its_base_and_its_adapters(tmp_path: Path, has_strengths: bool) -> None:
    model = a_graph(BODY.format(dtype="float"))
    contract = insert_inputs(
        model, find_sites(model), ["m.weight", "n.weight"], required=True, strength_input=has_strengths
    )
    save_graph(model, tmp_path, "model.onnx")
    for name, adapter in (("one", ONE), ("two", TWO)):
        onnx_adapter.write(tmp_path / name, adapter, contract, sha256="1")
    session = Session(tmp_path / "model.onnx", {name: tmp_path / name for name in ("one", "two")})
    assert np.array_equal(session.run({"x": X})["y"], X @ M @ N)
    assert np.array_equal(session.run({"x": X}, adapter="one")["y"], expected(ONE))  # the other layer has none
    assert np.array_equal(session.run({"x": X}, adapter="two")["y"], expected(TWO))
    if has_strengths:
        off = {"adapter_strengths": np.zeros(1, np.float32)}
        assert np.array_equal(session.run({"x": X, **off}, adapter="two")["y"], X @ M @ N)
    binding = session.io_binding(adapter="one")
    binding.bind_cpu_input("x", X)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], expected(ONE))
    runner = OnnxRunner(tmp_path / "model.onnx")
    assert runner.axes.keys() == {"x"} and np.array_equal(runner.run({"x": X})["y"], X @ M @ N)
    gc.collect()
    assert np.array_equal(runner.with_adapter(tmp_path / "one").run({"x": X})["y"], expected(ONE))
    assert checked_contract(load_graph(tmp_path / "model.onnx"), tmp_path).required
