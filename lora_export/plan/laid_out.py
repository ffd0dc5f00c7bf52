"""Pairs without a shape, as pairs of the weights that a plan lays them on."""

from __future__ import annotations

from dataclasses import replace

from lora_export.errors import InputRefused, MatchError, Misfit
from lora_export.lora import Adapter, LoraPair
from lora_export.pairs.open_shape import OpenPair
from lora_export.plan.match_names import BaseTensors, Prefix, weight_of
from lora_export.plan.types import Layout


def with_shapes(base: BaseTensors, adapter: Adapter, prefix: Prefix) -> Adapter:
    """The adapter without open pairs; those of weights that the base lacks, or in an unknown layout, stay open.

    Raises MatchError with every pair that has no form of its weight's shape.
    """
    names = {name: weight_of(prefix.to_base(name), base) for name, pair in adapter.pairs.items() if _is_open(pair)}
    specs = {name: base[weight] for name, weight in names.items() if weight is not None}
    shapes = {name: spec.matrix for name, spec in specs.items() if spec.layout is not Layout.UNKNOWN}
    pairs: dict[str, LoraPair] = {}
    misfits = []
    for name, shape in shapes.items():
        pair = adapter.pairs[name]
        try:
            pairs[name] = pair.for_shape(shape, list(shapes.values())) if isinstance(pair, OpenPair) else pair
        except InputRefused as error:
            misfits.append(Misfit(adapter.name, adapter.spelled(name), f"{names[name]}: {error}"))
    if misfits:
        raise MatchError(misfits, targets=len(adapter.pairs))
    return replace(adapter, pairs={**adapter.pairs, **pairs}) if pairs else adapter


def _is_open(pair: LoraPair) -> bool:
    return isinstance(pair, OpenPair)
