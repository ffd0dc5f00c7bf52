"""Run a graph that takes adapters: loaded once, switched with every call.

It prevents onnxruntime's silent failures. An adapter lives as long as it is loaded, and I/O binding uses it too. A
partial adapter, and one of another base or dtype, is refused when it is loaded. Needs onnxruntime and NumPy, and
neither PyTorch nor onnx.
"""

from __future__ import annotations

import ctypes
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import (
    ADAPTER_STRENGTHS,
    AdapterArrays,
    AdapterPlace,
    Contract,
    read_contract,
    read_strengths,
)
from lora_export.formats.onnx_adapter import ONNX_TYPES, array_of_ort_value, import_onnxruntime, ort_value_of_array
from lora_export.options.proof import Running
from lora_export.options.spelling import named
from lora_export.provenance import read_longest, refuse_larger
from lora_export.runtime.ort_session import LOG_ERRORS, open_session, raising_refusals

ADAPTER_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bfloat16)": "bfloat16",
}
NO_ADAPTERS: Mapping[str, Path] = MappingProxyType({})

OrtValues = Mapping[str, Any]  # input -> OrtValue


class Session:
    """A graph made by `export_onnx(lora="inputs")`, and adapters for it by name.

        session = Session("model.onnx", {"fr": "fr.onnx_adapter"})
        session.run(feeds, adapter="fr")
        session.run(feeds)  # the base

    `provider` is `cpu` or `cuda`. On `cuda`, adapters are stored on the GPU; bfloat16 ones are stored on the host, and
    onnxruntime copies them for each run. `options` are onnxruntime's SessionOptions. `session` is onnxruntime's
    InferenceSession, for everything else; where one of this graph is open already, it can be passed. Runs may be
    started from several threads.

    Raises InputRefused for a graph that was not made for adapters, and as `load` does; EnvironmentLacking where the
    provider is missing; RuntimeRefused where onnxruntime refuses the graph.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Mapping[str, str | Path] = NO_ADAPTERS,
        *,
        provider: str = Running.provider,
        options: Any = None,
        session: Any = None,
    ):
        self.model, self.provider = Path(model), provider
        if session is None:
            session = open_session(self.model, provider, _default_options() if options is None else options)
        self.session = session
        metadata = self.session.get_modelmeta().custom_metadata_map
        contract = read_contract(metadata, self.model)
        if contract.slots:
            raise InputRefused(f"{self.model} has slots, which lora_export.AdapterSlots fills")
        self.contract = _checked(contract, self.session, self.model)
        self.longest = read_longest(metadata, self.model)
        ones = np.ones(len(read_strengths(metadata, self.model)), np.float32)
        # Where the graph has no defaults. A run or a binding may have other strengths
        self._defaults = {ADAPTER_STRENGTHS: _owned_copy(ones)} if contract.required and ones.size else {}
        self._base_values = {name: _owned_copy(array) for name, array in self.contract.without_adapter().items()}
        self._loaded: dict[str, OrtValues] = {}
        for name, path in adapters.items():
            self.load(name, path)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def load(self, name: str, path: str | Path) -> None:
        """Load an `.onnx_adapter` under a name, in place of a loaded adapter of that name.

        Raises InputRefused where the file is not one for this graph, with every misfit of names, pairs, shapes, types
        and the base's fingerprint. The loaded adapters are then unchanged.
        """
        path = Path(path)
        file = onnx_adapter.read(path)
        onnx_adapter.refuse_misfits(file, self.contract, source=path, graph=self.model)
        self._loaded[name] = {key: self._on_device(array_of_ort_value(value)) for key, value in file.values.items()}

    def mix(self, name: str, strengths: Mapping[str, float]) -> None:
        """Load the weighted sum of loaded adapters as one more adapter, whose rank is the sum of theirs.

        Raises InputRefused for an adapter that is not loaded, a strength that is not finite, one of DoRA or IA3 that
        cannot be mixed, a sum of ranks above the graph's fixed one, and where the graph's dtype cannot hold a value.
        """
        parts = [(self._values_of(part), np.float32(strength)) for part, strength in strengths.items()]
        if not parts or not all(np.isfinite(strength) for _, strength in parts):
            raise InputRefused(f"a mix needs adapters and finite strengths, not {dict(strengths)}")
        mixed: dict[str, Any] = {}
        for place in self.contract.places:
            present = [(values, strength) for values, strength in parts if place.a in values]
            if present:
                _refuse_factors(name, place, present)
                mixed |= {key: self._on_device(array) for key, array in _concatenated(name, place, present).items()}
        self._loaded[name] = mixed

    def unload(self, name: str) -> None:
        """Remove an adapter. Runs and bindings that use it hold it until they end."""
        self._values_of(name)
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

        `feeds` are arrays or OrtValues by input; `options` are onnxruntime's RunOptions. Raises InputRefused for an
        adapter that is not loaded, for feeds of an adapter's own inputs, for missing ones, and for larger ones than the
        graph was made for; RuntimeRefused where onnxruntime refuses the run. A binding's inputs are not measured.
        """
        self._check_names(feeds)
        ort = import_onnxruntime()
        values = {
            name: value if isinstance(value, ort.OrtValue) else ort_value_of_array(ort, np.asarray(value))
            for name, value in feeds.items()
        }
        shapes = {value.name: value.shape for value in self.session.get_inputs() if value.name in values}
        for name, symbols in shapes.items() if self.longest else ():
            sizes = {str(symbol): size for symbol, size in zip(symbols, values[name].shape(), strict=False)}
            refuse_larger(sizes, self.longest, self.model, "Give shorter inputs")
        names = list(outputs) if outputs is not None else [output.name for output in self.session.get_outputs()]
        values = {**self._defaults, **values, **(self._base_values if self.contract.required else {})}
        values.update({} if adapter is None else self._values_of(adapter))
        with raising_refusals(self.model):
            results = self.session.run_with_ort_values(names, values, options)
        return {name: array_of_ort_value(value) for name, value in zip(names, results, strict=True)}

    def io_binding(self, *, adapter: str | None = None) -> Any:
        """A new onnxruntime IOBinding with the adapter bound; the caller binds the graph's inputs and outputs."""
        binding = self.session.io_binding()
        self.bind(binding, adapter=adapter)
        return binding

    def bind(self, binding: Any, *, adapter: str | None) -> None:
        """Bind this adapter, or none, to a binding of this session. Its later runs use it."""
        values = {} if adapter is None else self._values_of(adapter)
        for name, value in {**self._defaults, **self._base_values, **values}.items():
            binding.bind_ortvalue_input(name, value)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        """Run a binding, with its adapter. Raises RuntimeRefused where onnxruntime refuses the run."""
        with raising_refusals(self.model):
            self.session.run_with_iobinding(binding, options)

    def _check_names(self, feeds: Mapping[str, Any]) -> None:
        adapters_own = [name for name in feeds if name in self._base_values]
        if adapters_own:
            raise InputRefused(
                f"{', '.join(adapters_own)} are inputs of an adapter: load the adapter, and pass its name"
            )
        known = {*feeds, *self._defaults, *self._base_values}
        missing = [value.name for value in self.session.get_inputs() if value.name not in known]
        if missing:
            raise InputRefused(f"{self.model} also needs {', '.join(missing)}")

    def _values_of(self, name: str) -> OrtValues:
        if not isinstance(name, str):
            raise InputRefused(
                f"a run takes the name of one adapter, not {name!r}; `mix` combines several adapters into one"
            )
        if name not in self._loaded:
            near = difflib.get_close_matches(name, self._loaded, n=1)
            loaded = ", ".join(self._loaded) or "none"
            raise InputRefused(
                f"no adapter {name!r} is loaded; {f'the nearest name is {near[0]!r}' if near else f'loaded: {loaded}'}"
            )
        return self._loaded[name]

    def _on_device(self, array: NDArray[Any]) -> Any:
        """The array as an OrtValue on the device where this session runs."""
        if self.provider == "cuda" and ONNX_TYPES[str(array.dtype)] != ONNX_TYPES["bfloat16"]:
            return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        return _owned_copy(array)


def _default_options() -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = LOG_ERRORS  # else it warns of each optional input
    return options


def _checked(contract: Contract, session: Any, model: Path) -> Contract:
    """The contract with the dtypes that the graph has now. Raises InputRefused where the graph no longer fits it."""
    own = session.get_inputs() if contract.required else session.get_overridable_initializers()
    optional = {value.name: value for value in own}
    lost = [name for name in contract.inputs if name not in optional or optional[name].type not in ADAPTER_DTYPES]
    if lost:
        raise InputRefused(f"{model} has lost {len(lost)} of its adapter inputs, the first of them {lost[0]}")
    for place in contract.places:
        for name, sizes in place.input_shapes.items():
            shape = optional[name].shape
            if len(shape) != len(sizes) or any(
                wanted not in (None, size) for wanted, size in zip(sizes, shape, strict=True)
            ):
                raise InputRefused(
                    f"{model}: its metadata gives {place.weight} the shape {list(place.shape)}, which does not fit the "
                    f"input {name} {list(shape)}"
                )
    places = tuple(replace(place, dtype=ADAPTER_DTYPES[optional[place.a].type]) for place in contract.places)
    return replace(contract, places=places)


def _concatenated(name: str, place: AdapterPlace, present: Sequence[tuple[OrtValues, np.float32]]) -> AdapterArrays:
    """The values of one weight's inputs in a mix: the A and B of all adapters, concatenated along the rank."""
    a = np.concatenate([array_of_ort_value(values[place.a]) for values, _ in present], axis=place.rank_axis(place.a))
    b = np.concatenate(
        [array_of_ort_value(values[place.b]).astype(np.float32) * strength for values, strength in present],
        axis=place.rank_axis(place.b),
    )
    if place.max_rank:
        a, b = _with_fixed_rank(name, place, a, b)
    factors = {place.a: a, place.b: onnx_adapter.cast_factor(f"{name}, {place.weight}", place.b, b, place.dtype)}
    return factors | {key: array_of_ort_value(present[0][0][key]) for key in place.input_shapes if key not in factors}


def _with_fixed_rank(
    name: str, place: AdapterPlace, a: NDArray[Any], b: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A and B without the ranks that are zeros, which adapters were padded with, and padded to the fixed rank again."""
    axis, other = place.rank_axis(place.b), place.rank_axis(place.a)
    used = np.flatnonzero(b.any(axis=tuple(each for each in range(b.ndim) if each != axis)))
    if len(used) > place.max_rank:
        raise InputRefused(
            f"{name}, {place.weight}: the mix has the rank {len(used)}, and the graph takes at most {place.max_rank} "
            f"({named('max_rank')})"
        )
    return place.padded(place.a, a.take(used, axis=other)), place.padded(place.b, b.take(used, axis=axis))


def _refuse_factors(name: str, place: AdapterPlace, present: Sequence[tuple[OrtValues, np.float32]]) -> None:
    """The factors of DoRA and IA3 are correct for one adapter: for no other strength, and for no sum."""
    is_unchanged = len(present) == 1 and present[0][1] == 1
    inputs = [key for key in (place.factor, place.scale) if key]
    has_factors = any((array_of_ort_value(values[key]) != 1).any() for values, _ in present for key in inputs)
    if has_factors and not is_unchanged:
        raise InputRefused(
            f"{name}: an adapter uses DoRA or IA3 at {place.weight}. It cannot be mixed there with another adapter, "
            "and its strength must be 1: its factors are correct for this adapter alone"
        )


def _owned_copy(array: NDArray[Any]) -> Any:
    """An OrtValue with memory of its own: a binding holds the value, but would not hold an array."""
    value = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(array.shape, ONNX_TYPES[str(array.dtype)], "cpu")
    if array.size:
        array = np.ascontiguousarray(array)
        ctypes.memmove(value.data_ptr(), array.ctypes.data, array.nbytes)
    return value
