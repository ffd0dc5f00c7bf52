"""The tensors of an adapter under the names of its base, where the two are of different generations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from lora_export.errors import Misfit
from lora_export.lora import LoraPair
from lora_export.names.tensor_parts import NotExpressible
from lora_export.plan.attempts import (
    ConvertedNames,
    SpelledAdapter,
    module_of_tensor,
    prefix_notes,
    shape_in_model,
)
from lora_export.plan.placing import Place
from lora_export.plan.types import TensorSpec


class Respelling:
    """The tensors of an adapter, one after another, under the names of the base."""

    def __init__(self, attempt: ConvertedNames):
        self.attempt, self.adapter = attempt, attempt.adapter
        self.views: dict[str, TensorSpec] = {}
        self.misfits: list[Misfit] = []
        self.spelling = dict(self.adapter.spelling)
        self.modules: dict[str, str] = {}  # module of the adapter -> its new name, where it has one
        self.whole: dict[
            str, list[str]
        ] = {}  # module of the adapter -> those whose weights have all entries of a tensor

    def result(self) -> SpelledAdapter:
        attempt, adapter = self.attempt, self.adapter
        pairs: dict[str, LoraPair] = {}
        owners: dict[str, str] = {}
        for module, pair in adapter.pairs.items():
            for name, part in self._pairs(module, pair):
                if name in pairs:
                    self._refuse_second(name, owners[name], module)
                pairs[name], owners[name] = part, module
        biases = self._arrays({f"{module}.bias": change for module, change in adapter.biases.items()})
        added, replaced = self._arrays(adapter.added), self._arrays(adapter.replaced)
        token_rows = {
            name: rows
            for tensor, rows in adapter.token_rows.items()
            for name, place in self._tensor(tensor, ())
            if self._is_whole(place, tensor)
        }
        spelled = replace(
            adapter,
            pairs=pairs,
            biases={name.removesuffix(".bias"): change for name, change in biases.items()},
            added=added,
            replaced=replaced,
            token_rows=token_rows,
            layouts={new: layout for module, layout in adapter.layouts.items() for new in self._stored_alike(module)},
            tied={self._renamed(head): self._renamed(table) for head, table in adapter.tied.items()},
            spelling=self.spelling,
        )
        return SpelledAdapter(
            spelled,
            attempt.own_prefix,
            attempt.spelling,
            self.views,
            [*self.misfits, *attempt.misfits(spelled)],
            [*prefix_notes(adapter, attempt.prefix), attempt.note],
        )

    def _arrays(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {
            name: place.of_array(value)
            for tensor, value in values.items()
            for name, place in self._tensor(tensor, value.shape)
        }

    def _pairs(self, module: str, pair: LoraPair) -> Iterable[tuple[str, LoraPair]]:
        tensor = self.attempt.tensor_of(module)
        if tensor is None:
            return [(module, pair)]
        found = self._tensor(tensor, shape_in_model(pair), spelled=self.adapter.spelled(module))
        parts = []
        self.whole[module] = []
        for name, place in found:
            new = name if place.region is not None else module_of_tensor(name)
            self.spelling[new] = self.adapter.spelled(module)
            try:
                if place.region is not None and pair.embedding:
                    raise NotExpressible("splits a table of embeddings")
                parts.append((new, place.of_pair(pair)))
                self.whole[module] += [new] if place.region is None else []
            except NotExpressible as problem:
                self._refuse(self.adapter.spelled(module), place.tensor, problem)
        if len(parts) == 1:
            self.modules[module] = parts[0][0]
        return parts

    def _tensor(self, tensor: str, shape: Sequence[int], spelled: str = "") -> list[tuple[str, Place]]:
        """The new names of a tensor of the adapter, with the places that they mean."""
        spelled = spelled or self.adapter.spelled(tensor)
        try:
            places = self.attempt.places(tensor, shape)
        except NotExpressible as problem:
            self._refuse(spelled, tensor, problem)
            return []
        if not places:
            return [(tensor, Place(tensor))]
        named = []
        for place in places:
            prefix = self.attempt.own_prefix
            if place.region is not None:
                self.views.setdefault(place.name, place.view(self.attempt.base[place.tensor]))
            name = prefix.adapter + place.name.removeprefix(prefix.base)
            self.spelling[name] = spelled
            named.append((name, place))
        return named

    def _is_whole(self, place: Place, tensor: str) -> bool:
        if place.region is None:
            return True
        self._refuse(self.adapter.spelled(tensor), place.tensor, NotExpressible("splits a table of embeddings"))
        return False

    def _refuse(self, key: str, tensor: str, problem: NotExpressible) -> None:
        self.misfits.append(Misfit(self.adapter.name, key, f"{self.attempt.converts(tensor)} {problem}"))

    def _refuse_second(self, name: str, one: str, other: str) -> None:
        why = f"{self.adapter.spelled(one)} changes {name} too: one may repeat the other. Remove one from the file"
        self.misfits.append(Misfit(self.adapter.name, self.adapter.spelled(other), why))

    def _stored_alike(self, module: str) -> list[str]:
        """The new names under which the weight of a module is stored, or parts of its rows, and not transposed."""
        return self.whole.get(module) or [self._renamed(module)]

    def _renamed(self, module: str) -> str:
        return self.modules.get(module, module)
