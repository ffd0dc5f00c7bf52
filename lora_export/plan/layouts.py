"""How a matrix is stored, where the base does not state it: (out, in), or transposed.

A square matrix fits a pair in both layouts, and only one of the two sums is right. The layout is stated by the user,
shown by the shape, recorded by the adapter, or evident from other matrices and names of the base: see
`LayoutEvidence`. Where there is no evidence, or where it disagrees, the base is refused.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_export.errors import InputRefused, first_of
from lora_export.lora import Adapter, LoraPair
from lora_export.names.table import CONV1D_NAMES, LINEAR_NAMES, OF_CONV1D, module_kind
from lora_export.options.spelling import named
from lora_export.pairs.open_shape import OpenPair, known_shape
from lora_export.plan.match_names import BaseTensors, Prefix, weight_of
from lora_export.plan.types import Layout, LayoutSource, Step, TensorSpec

LINEAR_LAYOUTS = (Layout.OUT_IN, Layout.IN_OUT)
NAMED_WEIGHTS = 3  # weights that a message names


def check_stated(stated: Mapping[str, str], base: Mapping[str, TensorSpec]) -> None:
    """Raise InputRefused for a name that no matrix of the base has."""
    for pattern, layout in stated.items():
        if not any(len(spec.shape) == 2 and _names(pattern, name) for name, spec in base.items()):
            raise InputRefused(f"{named('layout', {pattern: layout})}: no matrix of the base has this name")


def settle_layouts(
    adapters: Sequence[Adapter], prefixes: Sequence[Prefix], base: BaseTensors, stated: Mapping[str, str]
) -> BaseTensors:
    """The base, with the layouts of the matrices that pairs change, where something decides them.

    Raises InputRefused where `stated` contradicts the base or a shape.
    """
    linear = dict(_linear_pairs(adapters, prefixes, base))
    recorded = _recorded(adapters, prefixes, base, stated)
    evidence = LayoutEvidence(base, linear)

    def of_weight(weight: str) -> dict[Layout, LayoutSource]:
        return evidence.of(weight) | dict.fromkeys(recorded.get(weight, ()), LayoutSource.ADAPTER)

    settled = {
        weight: _settled(base[weight], pair, stated_layout(weight, stated), of_weight)
        for weight, pair in linear.items()
    }
    return BaseTensors(settled.get(name, spec) for name, spec in base.items())


def refuse_unknown(steps: Sequence[Step]) -> None:
    """Raise InputRefused where the layout of a weight that pairs change is unknown."""
    specs = [step.spec for step in steps if step.terms and step.spec.layout is Layout.UNKNOWN]
    if specs:
        unknown, square = [spec.name for spec in specs], "square " * all(len(set(spec.shape)) == 1 for spec in specs)
        raise InputRefused(
            f"the layout of {len(unknown)} {square}{'matrix' if len(unknown) == 1 else 'matrices'} is unknown: "
            f"{first_of(unknown, NAMED_WEIGHTS)}. Neither the base nor the adapter determines whether it is "
            "stored (out, in), as nn.Linear does, or (in, out), as transformers' Conv1D does. State it by "
            f"{named('layout', {'NAME': 'out_in'})} or {named('layout', {'NAME': 'in_out'})}; "
            "NAME is a tensor, a module or a glob such as '*'"
        )


_EVIDENCE = {
    LayoutSource.ADAPTER: "as the adapter records",
    LayoutSource.SIBLINGS: "as matrices of such names that are not square are",
    LayoutSource.NAME: "by their names, which transformers and diffusers give to nn.Linear alone",
}


def layout_notes(steps: Sequence[Step]) -> Iterator[str]:
    """What decided the layout of the square matrices of which the base does not state it, in sentences."""
    by_reason: dict[tuple[Layout, LayoutSource], list[str]] = {}
    for step in steps:
        is_recorded = step.spec.layout_source is LayoutSource.ADAPTER and step.spec.layout is Layout.OUT_IN
        if step.spec.layout_source in _EVIDENCE and not is_recorded:  # lora-export itself records (out, in)
            by_reason.setdefault((step.spec.layout, step.spec.layout_source), []).append(step.weight)
    for (layout, source), weights in by_reason.items():
        count = f"{len(weights)} square {'matrix is' if len(weights) == 1 else 'matrices are'}"
        yield f"{count} taken as stored {layout} {_EVIDENCE[source]}, such as {weights[0]}."


def _linear_pairs(
    adapters: Sequence[Adapter], prefixes: Sequence[Prefix], base: BaseTensors
) -> Iterator[tuple[str, LoraPair]]:
    """The matrices of linear layers that the adapters change, each with a pair for it."""
    for adapter, prefix in zip(adapters, prefixes, strict=True):
        for module, stored in adapter.pairs.items():
            weight = weight_of(prefix.to_base(module), base)
            if weight is not None and not stored.embedding and len(base[weight].shape) == 2:
                pair = _for_one_layout(stored, base[weight].shape)
                # A convolution of size 1 is a linear layer.
                is_point = len(known_shape(pair)) > 2 and set(pair.shape[2:]) == {1}
                yield weight, pair.with_kernel(()) if is_point else pair


def _for_one_layout(pair: LoraPair, stored: tuple[int, ...]) -> LoraPair:
    """A pair whose file does not show all of its shape, for a matrix that is stored (out, in), or else transposed."""
    ways = [pair.for_weight(shape) for shape in (stored, stored[::-1])]
    fitting = [way for way in ways if 0 not in known_shape(way)]
    return fitting[0] if len({known_shape(way) for way in fitting}) == 1 else pair


def _settled(
    spec: TensorSpec, pair: LoraPair, stated: Layout | None, evidence: Callable[[str], Mapping[Layout, LayoutSource]]
) -> TensorSpec:
    own = _own_layout(spec, pair)
    if own is not None and stated not in (None, own):
        why = "the base's" if spec.layout is not Layout.UNKNOWN else f"with the shape {spec.shape}, the adapter's"
        raise InputRefused(f"{named('layout')} states that {spec.name} is {stated}, but {why} is {own}")
    if spec.layout is not Layout.UNKNOWN:
        return spec
    if own is not None:
        return replace(spec, layout=own, layout_source=LayoutSource.SHAPE)
    if (shape := known_shape(pair)) not in (spec.shape, ()) and 0 not in shape:  # it fits in neither layout: a misfit
        return spec
    if stated is not None:
        return replace(spec, layout=stated, layout_source=LayoutSource.OPTION)
    found = list(evidence(spec.name).items())
    if len(found) == 1:
        ((layout, source),) = found
        return replace(spec, layout=layout, layout_source=source)
    return spec


def _own_layout(spec: TensorSpec, pair: LoraPair) -> Layout | None:
    """The layout that the base states or that the shape shows; None where neither does."""
    if spec.layout is Layout.MATRIX:
        return Layout.OUT_IN
    if spec.layout is not Layout.UNKNOWN:
        return spec.layout if spec.layout in LINEAR_LAYOUTS else None
    if isinstance(pair, OpenPair) and len(set(spec.shape)) == 2 and pair.outputs in spec.shape:
        return Layout.OUT_IN if pair.outputs == spec.shape[0] else Layout.IN_OUT
    if len(set(spec.shape)) == 1 or known_shape(pair) not in (spec.shape, spec.shape[::-1]):
        return None
    return Layout.OUT_IN if pair.shape == spec.shape else Layout.IN_OUT


def _recorded(
    adapters: Sequence[Adapter], prefixes: Sequence[Prefix], base: BaseTensors, stated: Mapping[str, str]
) -> dict[str, set[Layout]]:
    """The layouts that adapters record, by weight.

    PEFT writes one `fan_in_fan_out` for all modules, whatever it found at the last of them. A record of an adapter is
    therefore no evidence where another weight, or the user, contradicts a record of the same adapter.
    """
    by_weight: dict[str, set[Layout]] = {}
    for adapter, prefix in zip(adapters, prefixes, strict=True):
        own: dict[str, Layout] = {}
        contradicted = False
        for module, layout in adapter.layouts.items():
            weight = weight_of(prefix.to_base(module), base)
            if weight is None or module not in adapter.pairs or len(base[weight].shape) != 2:
                continue
            own[weight] = Layout(layout)
            known = _own_layout(base[weight], adapter.pairs[module]) or stated_layout(weight, stated)
            contradicted = contradicted or known not in (None, own[weight])
        for weight, recorded in () if contradicted else own.items():
            by_weight.setdefault(weight, set()).add(recorded)
    return by_weight


def stated_layout(weight: str, stated: Mapping[str, str]) -> Layout | None:
    """The last layout that the user stated for this weight."""
    matching = [layout for pattern, layout in stated.items() if _names(pattern, weight)]
    return Layout(matching[-1]) if matching else None


def _names(pattern: str, weight: str) -> bool:
    """Whether a pattern is the name of this tensor or of its module, or a glob that matches one of them."""
    names = (weight, weight.removesuffix(".weight"))
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)


# --- What a file without a config tells of how its square matrices are stored: by other matrices, and by names ---
#
# Two kinds of evidence. A matrix that is not square shows how it is stored, by its pair or by its bias, which has one
# entry for each output; matrices of the same kind of name are of the same class. And only GPT-2's relatives have a
# Conv1D, by few names: where the file has a stack of layers with names that transformers gives to nn.Linear alone, such
# as `layers.0.q_proj`, each layer of such a name is one; so is each layer of a model for images that the tables of
# diffusion models name. Names are no evidence in a file in which a matrix of another name than those of a Conv1D is
# stored (in, out).

OF_A_STACK = re.compile(r"(.+\.)?\d+\..+")


@dataclass(frozen=True)
class LayoutEvidence:
    """The evidence in the names and shapes of a base. `pairs` has a pair for some of its matrices, by tensor."""

    base: Mapping[str, TensorSpec]
    pairs: Mapping[str, LoraPair]

    def of(self, weight: str) -> dict[Layout, LayoutSource]:
        """The layouts of a square matrix that something is evidence for, each with what that is; two disagree."""
        module = weight.removesuffix(".weight")
        found = dict.fromkeys(self._shown.get(module_kind(module), ()), LayoutSource.SIBLINGS)
        if self._is_linear(module):
            found.setdefault(Layout.OUT_IN, LayoutSource.NAME)
        return found

    def _is_linear(self, module: str) -> bool:
        last, others = module.rpartition(".")[2], (kind for kind in self._shown if kind != OF_CONV1D)
        if last in CONV1D_NAMES or any(Layout.IN_OUT in self._shown[kind] for kind in others):
            return False
        return (last in LINEAR_NAMES and self._has_stack) or self._is_diffusion_model

    @functools.cached_property
    def _has_stack(self) -> bool:
        """Whether a numbered layer of the file has a matrix with a name of nn.Linear."""
        modules = (name.removesuffix(".weight") for name, spec in self.base.items() if len(spec.shape) == 2)
        return any(name.rpartition(".")[2] in LINEAR_NAMES and OF_A_STACK.fullmatch(name) for name in modules)

    @functools.cached_property
    def _is_diffusion_model(self) -> bool:
        from lora_export.names.diffusion_layouts import other_layouts  # few bases leave the question open

        return bool(other_layouts(self.base))

    @functools.cached_property
    def _shown(self) -> dict[str, set[Layout]]:
        """The layouts that matrices of each kind of name show."""
        shown: dict[str, set[Layout]] = {}
        for name, spec in self.base.items():
            if len(spec.shape) == 2 and spec.layout is Layout.UNKNOWN and (layout := self._shown_by(spec)) is not None:
                shown.setdefault(module_kind(name.removesuffix(".weight")), set()).add(layout)
        return shown

    def _shown_by(self, spec: TensorSpec) -> Layout | None:
        """The layout that a matrix shows whose outputs its pair or its bias counts; None where it shows none."""
        bias, pair = self.base.get(f"{spec.name.removesuffix('.weight')}.bias"), self.pairs.get(spec.name)
        outputs = bias.shape if pair is None and bias is not None else () if pair is None else known_shape(pair)[:1]
        rows, columns = ((size,) for size in spec.shape)
        if rows == columns or outputs not in (rows, columns):
            return None
        return Layout.OUT_IN if outputs == rows else Layout.IN_OUT
