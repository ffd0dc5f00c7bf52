"""Run a graph that takes adapters: loaded once, switched with every call.

What goes wrong without a word in onnxruntime itself cannot happen here: an adapter lives as long as it
is loaded, I/O binding gets it too, and one that is partial, made for another base or of another type is
refused when it is loaded. Needs onnxruntime and NumPy, and neither PyTorch nor onnx.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import ONNX_TYPES, AdapterSlot, Contract, as_array, import_onnxruntime
from lora_export.runtime.environment import PROVIDERS

TENSOR_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"} | {
    "tensor(bfloat16)": "bfloat16"
}
NONE: Mapping[str, Path] = MappingProxyType({})

Arrays = Mapping[str, NDArray[Any]]
Values = Mapping[str, Any]  # input -> OrtValue


class Session:
    """A graph made by `lora-export onnx --lora inputs`, and adapters for it by name.

        session = Session("model.onnx", {"fr": "fr.onnx_adapter"})
        session.run(feeds, adapter="fr")
        session.run(feeds)  # the base

    `provider` is `cpu` or `cuda`; on `cuda` adapters are kept on the GPU (bfloat16 ones on the host, from
    where onnxruntime fetches them for each run). `options` are onnxruntime's SessionOptions. `session` is
    onnxruntime's InferenceSession, for everything else. Runs may be started from several threads.

    Raises InputRefused for a graph that was not made for adapters, and as `load` does; EnvironmentLacking
    where the provider is missing; RuntimeRefused where onnxruntime refuses the graph.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] = NONE,
        *,
        provider: str = "cpu",
        options: Any = None,
    ):
        self.model, self.provider = Path(model), provider
        self.session = _session(self.model, provider, options)
        contract = onnx_adapter.read_contract(self.session.get_modelmeta().custom_metadata_map, self.model)
        self.contract = _as_it_is(contract, self.session, self.model)
        self._bare = {
            name: _owned(array) for place in self.contract.slots for name, array in place.without_adapter().items()
        }
        self._loaded: dict[str, Values] = {}
        for name, path in adapters.items():
            self.load(name, path)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        return tuple(self._loaded)

    def load(self, name: str, path: str | Path) -> None:
        """Load an `.onnx_adapter` under a name; one of that name is replaced for the runs to come.

        Raises InputRefused, and keeps what was loaded, where the file is not one for this graph: with
        every misfit of names, pairs, shapes, types and the base's fingerprint.
        """
        path = Path(path)
        file = onnx_adapter.read(path)
        onnx_adapter.refuse_misfits(file, self.contract, source=path, graph=self.model)
        self._loaded[name] = {key: self._placed(as_array(value)) for key, value in file.values.items()}

    def mix(self, name: str, strengths: Mapping[str, float]) -> None:
        """Load the weighted sum of adapters that are loaded, as one more: their ranks stand side by side.

        Raises InputRefused for an adapter that is not loaded, a strength that is not finite, and where the
        graph's dtype cannot hold a value.
        """
        parts = [(self._found(part), np.float32(strength)) for part, strength in strengths.items()]
        if not parts or not all(np.isfinite(strength) for _, strength in parts):
            raise InputRefused(f"a mix needs adapters and finite strengths, not {dict(strengths)}")
        mixed: dict[str, Any] = {}
        for place in self.contract.slots:
            there = [(values, strength) for values, strength in parts if place.a in values]
            if there:
                self._refuse_dora(name, place, there)
                mixed |= {key: self._placed(array) for key, array in self._side_by_side(name, place, there).items()}
        self._loaded[name] = mixed

    def _side_by_side(self, name: str, place: AdapterSlot, there: Sequence[tuple[Values, np.float32]]) -> Arrays:
        """What a mix gives to one place's inputs."""
        a = np.concatenate([as_array(values[place.a]) for values, _ in there], axis=place.rank_axis(place.a))
        b = np.concatenate(
            [as_array(values[place.b]).astype(np.float32) * strength for values, strength in there],
            axis=place.rank_axis(place.b),
        )
        given = {place.a: a, place.b: onnx_adapter.cast_factor(f"{name}, {place.weight}", place.b, b, place.dtype)}
        return given | {key: as_array(there[0][0][key]) for key in place.input_shapes if key == place.factor}

    def _refuse_dora(self, name: str, place: AdapterSlot, there: Sequence[tuple[Values, np.float32]]) -> None:
        """DoRA's factor holds for one W + sBA: for no other strength, and for no sum."""
        as_it_is = len(there) == 1 and there[0][1] == 1
        if place.factor and not as_it_is and any((as_array(values[place.factor]) != 1).any() for values, _ in there):
            raise InputRefused(
                f"{name}: an adapter with DoRA stands at {place.weight}, where it can be mixed with no other and has "
                "no strength but 1: its factor was made for W + sBA as it is"
            )

    def unload(self, name: str) -> None:
        """Forget an adapter; runs and bindings that have it keep it until they end."""
        self._found(name)
        del self._loaded[name]

    def run(
        self,
        feeds: Mapping[str, Any],
        *,
        adapter: str | None = None,
        outputs: Sequence[str] | None = None,
        options: Any = None,
    ) -> dict[str, NDArray[Any]]:
        """Outputs by name (all, unless `outputs` names them), computed with one adapter, or with none.

        `feeds` are arrays or OrtValues by input; `options` are onnxruntime's RunOptions. Raises
        InputRefused for an adapter that is not loaded, for feeds of an adapter's own inputs, and for missing ones;
        RuntimeRefused where onnxruntime refuses the run.
        """
        own = [name for name in feeds if name in self._bare]
        if own:
            raise InputRefused(f"{', '.join(own)} are an adapter's inputs: load it, and name it")
        missing = [needed.name for needed in self.session.get_inputs() if needed.name not in {*feeds, *self._bare}]
        if missing:
            raise InputRefused(f"{self.model} needs {', '.join(missing)} too")
        ort = import_onnxruntime()
        values = {
            name: value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(np.asarray(value))
            for name, value in feeds.items()
        }
        names = list(outputs) if outputs is not None else [output.name for output in self.session.get_outputs()]
        values.update(self._given(adapter))
        with _refusals(self.model):
            results = self.session.run_with_ort_values(names, values, options)
        return {name: as_array(value) for name, value in zip(names, results, strict=True)}

    def io_binding(self, *, adapter: str | None = None) -> Any:
        """A new binding of onnxruntime's with the adapter bound; the caller binds the graph's inputs and outputs."""
        binding = self.session.io_binding()
        self.bind(binding, adapter=adapter)
        return binding

    def bind(self, binding: Any, *, adapter: str | None) -> None:
        """Let a binding of this session run with this adapter, or with none, from now on."""
        for name, value in {**self._bare, **self._given(adapter)}.items():
            binding.bind_ortvalue_input(name, value)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        """Run what is bound, adapter included."""
        with _refusals(self.model):
            self.session.run_with_iobinding(binding, options)

    def _given(self, adapter: str | None) -> Values:
        return {} if adapter is None else self._found(adapter)

    def _found(self, name: str) -> Values:
        if not isinstance(name, str):
            raise InputRefused(
                f"one adapter a run, by its name, not {name!r}; `mix` makes one of several, each with its strength"
            )
        if name not in self._loaded:
            near = difflib.get_close_matches(name, self._loaded, n=1)
            loaded = ", ".join(self._loaded) or "none"
            raise InputRefused(
                f"there is no adapter {name!r}; {f'the nearest is {near[0]!r}' if near else f'loaded: {loaded}'}"
            )
        return self._loaded[name]

    def _placed(self, array: NDArray[Any]) -> Any:
        """The array where this session runs."""
        if self.provider == "cuda" and ONNX_TYPES[str(array.dtype)] != ONNX_TYPES["bfloat16"]:
            return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        return _owned(array)


def _owned(array: NDArray[Any]) -> Any:
    """A copy in memory that is the OrtValue's own: a binding keeps the value, but would not keep an array."""
    value = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(array.shape, ONNX_TYPES[str(array.dtype)], "cpu")
    if array.size:
        array = np.ascontiguousarray(array)
        ctypes.memmove(value.data_ptr(), array.ctypes.data, array.nbytes)
    return value


def _session(model: Path, provider: str, options: Any) -> Any:
    ort = import_onnxruntime()
    if provider not in PROVIDERS:
        raise InputRefused(f"unknown provider {provider!r}; known: {', '.join(PROVIDERS)}")
    asked = PROVIDERS[provider]
    if asked not in ort.get_available_providers():
        raise EnvironmentLacking(
            f"this onnxruntime ({ort.__version__}) has no {asked}: pip install onnxruntime-gpu "
            "(and uninstall onnxruntime, which would shadow it)"
        )
    if provider == "cuda" and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # or it warns of each optional input
    with _refusals(model), contextlib.redirect_stdout(sys.stderr):
        session = ort.InferenceSession(str(model.resolve()), options, providers=[asked])
    if asked not in session.get_providers():
        raise EnvironmentLacking(
            f"{asked} was asked for and could not be loaded; `lora-export doctor --provider {provider}` says what is "
            "missing"
        )
    return session


def _as_it_is(contract: Contract, session: Any, model: Path) -> Contract:
    """The contract with the types that the graph has now. Raises InputRefused where its inputs are gone, or others."""
    optional = {value.name: value.type for value in session.get_overridable_initializers()}
    gone = [name for name in contract.inputs if optional.get(name) not in TENSOR_TYPES]
    if gone:
        raise InputRefused(f"{model} has lost {len(gone)} of its inputs for adapters, the first of them {gone[0]}")
    shapes = {value.name: value.shape for value in session.get_overridable_initializers()}
    for place in contract.slots:
        for name, sizes in place.input_shapes.items():
            if len(shapes[name]) != len(sizes) or any(
                size not in (None, there) for size, there in zip(sizes, shapes[name], strict=True)
            ):
                raise InputRefused(f"{model}: its record says {list(place.shape)} of {place.weight}, {name} is another")
    places: Iterator[AdapterSlot] = (replace(place, dtype=TENSOR_TYPES[optional[place.a]]) for place in contract.slots)
    return replace(contract, slots=tuple(places))


@contextlib.contextmanager
def _refusals(model: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions share no base class but this one
        raise RuntimeRefused(f"onnxruntime refused {model}: {error}") from error
