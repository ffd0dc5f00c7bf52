"""The inner values of a candidate, module by module: of a graph made its outputs, of a module seen by hooks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lora_export import layers
from lora_export.errors import InputRefused
from lora_export.graph import onnx_file as graph_files
from lora_export.graph import sites as graph_sites
from lora_export.layers import MatrixWeight
from lora_export.plan import Layout, Plan
from lora_export.runtime.kv_cache import CacheRunner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner, ScriptRunner
from lora_export.verification import parity
from lora_export.verification.diagnose.graph_taps import Watched, expose, watch
from lora_export.verification.diagnose.watch_modules import Array, Key, Values, places_in, recorded

SAME_SCRIPT = 1e-4, 1e-5  # rtol and atol within which a script computes what a module with its weights does


class Followed(Protocol):
    """A candidate whose inner values can be had."""

    @property
    def keys(self) -> Sequence[Key]: ...  # in the order in which they run; empty where all may be there

    def run(self, inputs: Arrays, keys: Sequence[Key]) -> dict[Key, Values]: ...

    def outputs(self, inputs: Arrays) -> Arrays: ...

    def stored(self, key: Key) -> Array | None: ...

    def has_bias(self, key: Key, /) -> bool: ...


@dataclass(frozen=True, eq=False)
class Suspect:
    """One case of a proof, with all who took part in it."""

    candidate: Runner
    reference: Fp64Runner
    attached: Fp64Runner  # the adapters as they are, where the reference's weights were rounded
    deployed: ModuleRunner
    base: nn.Module  # without adapters
    plan: Plan | None
    inputs: Arrays
    case: parity.Case
    keep_replaced: bool = False  # without its adapters the base keeps the tensors that they bring whole

    @cached_property
    def places(self) -> dict[str, MatrixWeight]:
        return places_in(self.base)

    @cached_property
    def attached_places(self) -> dict[str, MatrixWeight]:
        return places_in(self.attached.module)

    @cached_property
    def settled_places(self) -> dict[str, MatrixWeight]:
        """Of the reference, where it is another than that to which the adapters are attached."""
        return {} if self.reference is self.attached else places_in(self.reference.module)

    def reference_values(self, keys: Collection[Key], **inputs: Array) -> dict[Key, Values]:
        """What the reference's modules are given and give, with some inputs changed."""
        return recorded(self.reference.module, lambda: self.reference.run({**self.inputs, **inputs}), keys)

    def deployed_values(self, keys: Collection[Key], **inputs: Array) -> dict[Key, Values]:
        return recorded(self.deployed.module, lambda: self.deployed.run({**self.inputs, **inputs}), keys)

    def base_values(self, keys: Collection[Key]) -> dict[Key, Values]:
        if self.plan is None:
            return {}
        with layers.scale_adapters(self.attached.module, 0.0, keep_replaced=self.keep_replaced):
            return recorded(self.attached.module, lambda: self.attached.run(self.inputs), keys)


def follow(suspect: Suspect) -> Followed:
    """Make a candidate's inner values visible. Raises InputRefused where that cannot be done."""
    candidate = suspect.candidate
    if isinstance(candidate, OnnxRunner):
        return _FollowedGraph(candidate, suspect.places, tuple(suspect.inputs))
    if isinstance(candidate, CacheRunner):
        return _FollowedGraph(candidate.inner, suspect.places, tuple(suspect.inputs), candidate)
    if isinstance(candidate, ModuleRunner):
        return _FollowedModule(candidate)
    if isinstance(candidate, ScriptRunner):
        return _FollowedModule(ModuleRunner(_with_weights_of(candidate, suspect)))
    raise InputRefused(f"a {type(candidate).__name__} is not followed")


def _with_weights_of(candidate: ScriptRunner, suspect: Suspect) -> nn.Module:
    """The model with a TorchScript file's weights, A and B where it has them: no hook sees into the file itself."""
    state = candidate.script.state_dict()
    for module in (copy.deepcopy(suspect.base), copy.deepcopy(suspect.deployed.module)):
        names = module.state_dict().keys()
        if names <= state.keys() <= names | dict(module.named_buffers()).keys():  # a script keeps every buffer
            break
    else:
        raise InputRefused("the TorchScript file holds other tensors than the model, and cannot be seen into")
    module.load_state_dict({name: state[name] for name in names})
    answer = named_alike(ModuleRunner(module).run(suspect.inputs), suspect.case)
    if any(not np.allclose(answer[name], value, *SAME_SCRIPT) for name, value in suspect.case.candidate.items()):
        raise InputRefused("the TorchScript file computes something else with its weights than the model")
    return module


class _FollowedGraph:
    """A graph with further outputs, in memory; its weights are read where they are.

    A graph with a `cache` is given a prompt, and a cache in which nothing is.
    """

    def __init__(
        self,
        runner: OnnxRunner,
        places: Mapping[str, MatrixWeight],
        inputs: Sequence[str],
        cache: CacheRunner | None = None,
    ):
        self.cache = cache
        model = graph_files.load(runner.path)
        found = graph_sites.find(model)
        spelled = _spelled(found.by_name, places)
        biased = {name: places[own].has_bias for name, own in spelled.items()}
        self.watched: dict[Key, Watched] = {}
        for watched in watch(model, found, inputs, biased):
            own = spelled[watched.name]
            call = sum(key.weight == own for key in self.watched)
            self.watched[Key(own, call)] = watched
        if not self.watched:
            raise InputRefused("the graph names no weight that the model has")
        exposed = expose(model, list(self.watched.values()))
        self.added = set(exposed.outputs)
        self.runner = runner.with_graph(exposed.message, exposed.folder)

    @property
    def keys(self) -> Sequence[Key]:
        return [key for key, there in self.watched.items() if there.y is not None]

    def run(self, inputs: Arrays, keys: Sequence[Key]) -> dict[Key, Values]:
        names = {name for key in keys for name in (self.watched[key].x, self.watched[key].y) if name}
        given = inputs if self.cache is None else self.cache.prompt_feeds(inputs)
        values = {**given, **self.runner.run(given, sorted(names - given.keys()))}
        found = {}
        for key in keys:
            there = self.watched[key]
            found[key] = Values(values[there.x] if there.x else None, values[there.y or ""])
        return found

    def others(self) -> Iterator[tuple[str, _FollowedGraph]]:
        """The same with each other adapter that the graph holds, where all rows have one of them."""
        names = self.runner.adapters_by_row
        if self.runner.adapter_ids is None or len(self.runner.adapter_ids) != 1 or names is None:
            return
        for number, name in enumerate(["the base", *names]):
            if number != self.runner.adapter_ids[0]:
                other = copy.copy(self)
                other.runner = self.runner.with_rows([number])
                yield f"adapter id {number} ({name})", other

    @property
    def lacks_adapter(self) -> bool:
        """Whether the graph takes an adapter's file, and was given none."""
        return self.runner.lacks_adapter

    def outputs(self, inputs: Arrays) -> Arrays:
        kept = {tensor.present for tensor in self.cache.cache} if self.cache else set()
        names = [value.name for value in self.runner.session.get_outputs() if value.name not in self.added | kept]
        return self.runner.run(inputs if self.cache is None else self.cache.prompt_feeds(inputs), names)

    def stored(self, key: Key) -> Array | None:
        site = self.watched[key].site
        matrix = site.array.T if site.layout is Layout.EMBEDDING else site.matrix
        return matrix.reshape(len(matrix), -1).astype(np.float64)

    def has_bias(self, key: Key) -> bool:
        return self.watched[key].has_bias


def _spelled(names: Mapping[str, object], places: Mapping[str, MatrixWeight]) -> dict[str, str]:
    """What the model calls each weight of a graph, a prefix of either aside."""
    spelled = {name: name for name in names if name in places}
    for name in names.keys() - spelled.keys():
        ends = [own for own in places if own.endswith(f".{name}") or name.endswith(f".{own}")]
        if len(ends) == 1 and ends[0] not in spelled.values():
            spelled[name] = ends[0]
    return spelled


class _FollowedModule:
    """A module, watched by hooks."""

    def __init__(self, runner: ModuleRunner):
        self.runner = runner
        self.places = places_in(runner.module)
        if not self.places:
            raise InputRefused("the module has no layer that could be watched")

    @property
    def keys(self) -> Sequence[Key]:
        return []

    def run(self, inputs: Arrays, keys: Sequence[Key]) -> dict[Key, Values]:
        return recorded(self.runner.module, lambda: self.runner.run(inputs), keys)

    def outputs(self, inputs: Arrays) -> Arrays:
        return self.runner.run(inputs)

    def stored(self, key: Key) -> Array | None:
        return matrix_of(self.places[key.weight])

    def has_bias(self, _: Key) -> bool:
        return True


def matrix_of(place: MatrixWeight) -> NDArray[np.float64]:
    """The weight (out, in) in fp64, without what is attached to it, a convolution's kernel flattened."""
    weight = place.tensor.detach().double().cpu().numpy()
    weight = weight.T if place.layout.is_transposed else weight
    return weight.reshape(len(weight), -1)


def named_alike(outputs: Arrays, case: parity.Case) -> Arrays:
    return renamed(outputs, case.candidate)


def renamed(outputs: Arrays, others: Mapping[str, Array]) -> Arrays:
    if outputs.keys() == others.keys() or len(outputs) != len(others):
        return outputs
    return dict(zip(others, outputs.values(), strict=True))
