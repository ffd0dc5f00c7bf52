"""A PyTorch model with a description of its inputs: shapes, axes that vary, and how to generate them from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lora_export.graph.cache_names import TOKEN_TYPES
from lora_export.models.stored_parameter import state_of

ModelInputs = dict[str, torch.Tensor]
Axes = dict[str, dict[int, str]]  # input -> axis -> the size's symbol
Sizes = dict[str, int]  # symbol -> size
Limits = dict[str, tuple[int, int | None]]  # symbol -> least and greatest size
MakeInputs = Callable[[Sizes, torch.Generator], ModelInputs]
Derive = Callable[[Sizes], Sizes]


# Sizes to trace with. None is 1, since an exporter takes a size of 1 for a constant.
TRACED_SIZES = {"batch": 2, "sequence": 11, "target": 7, "images": 3}

# Sizes to verify at: none of them is the traced one, one batch has a single row, and one an even number of them. Of the
# images among the tokens of a text, one row has two, and one none.
CHECKED_SIZES = (
    {"batch": 1, "sequence": 5, "target": 5, "images": 2},
    {"batch": 3, "sequence": 16, "target": 9, "images": 2},
    {"batch": 4, "sequence": 29, "target": 13, "images": 5},
)


@dataclass(frozen=True, eq=False)
class Model:
    """The PyTorch model that MODEL names: no adapters attached, in eval mode, in fp32 unless another dtype was chosen.

    `axes` lists its inputs in the order of forward's parameters.
    """

    source: str  # MODEL
    module: nn.Module
    axes: Axes  # the axes whose sizes may vary, by input
    make_inputs: MakeInputs
    traced_sizes: Sizes  # the sizes of the example inputs
    is_huggingface: bool = False
    limits: Limits = field(default_factory=dict)  # the sizes that a symbol may have, if not all
    steps: Sizes = field(default_factory=dict)  # by how much a size has to change to make a difference, if not by 1
    further: tuple[Sizes, ...] = ()  # what else differs from CHECKED_SIZES in one more case each: a long text
    traced: Limits = field(default_factory=dict)  # sizes that a trace computes as the model does; empty: all, as known
    new_weights: tuple[str, ...] = ()  # weights that the folder lacks: they have random values, or an adapter's
    notes: tuple[str, ...] = ()  # remarks that a verdict on this model repeats
    not_judged: tuple[str, ...] = ()  # what the generated inputs leave out
    derive: Derive | None = None  # makes the sizes of all inputs from CHECKED_SIZES, where texts contain images
    placeholders: tuple[int, ...] = ()  # the tokens of the images in a text
    text_only: Model | None = None  # the same model, without the images of its texts

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self.axes)

    def example_inputs(self) -> ModelInputs:
        """The inputs to trace with. The same on every call."""
        return self.inputs(self.traced_sizes, seed=0)

    def inputs(self, sizes: Mapping[str, int], *, seed: int) -> ModelInputs:
        """Generate inputs of these sizes from a seed. Symbols that `sizes` lacks keep their traced size."""
        return self.make_inputs({**self.traced_sizes, **sizes}, torch.Generator().manual_seed(seed))

    def taking(self, names: Collection[str]) -> Model:
        """The model for a candidate with these inputs: without the images of its texts, where it takes none.

        A candidate whose inputs are not known has no names, and gets all of them.
        """
        takes_all = not names or set(self.axes) <= set(names)
        return self if takes_all or self.text_only is None else replace(self.text_only, module=self.module)

    def without_token_types(self, names: Collection[str]) -> Model:
        """The model for a candidate with these inputs: without token types, where only these are missing.

        Many graphs of BERT and its relatives take none. A model of transformers counts them as 0 then.
        """
        if not self.is_huggingface or set(self.axes) - set(names) != {TOKEN_TYPES}:
            return self

        def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
            return {name: value for name, value in self.make_inputs(sizes, generator).items() if name != TOKEN_TYPES}

        return replace(
            self,
            axes={name: axes for name, axes in self.axes.items() if name != TOKEN_TYPES},
            make_inputs=make,
            not_judged=(*self.not_judged, f"{TOKEN_TYPES}: the candidate does not take them; all are 0"),
        )

    def without_images(self, why: str) -> Model:
        """The model without the images of its texts. Its verdicts list them, and why they are not judged."""
        assert self.text_only is not None
        not_judged = tuple(f"{text} ({why})" for text in self.text_only.not_judged)
        return replace(self.text_only, module=self.module, not_judged=not_judged)

    def fingerprint(self) -> str:
        """The SHA-256 of all weights with their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(state_of(self.module).items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def checked_sizes(self, fixed: Mapping[str, int], limits: Limits | None = None) -> list[Sizes]:
        """Sets of sizes to verify at: three that differ from the traced ones in every varying axis, and further ones.

        The sizes in `fixed` are taken as they are. The others stay within the model's own `limits` and those passed.
        A further set is left out where these leave it between the sizes of the three.
        """
        symbols = sorted({symbol for axes in self.axes.values() for symbol in axes.values()})
        sets: list[Sizes] = []
        for number, chosen in enumerate([*CHECKED_SIZES, *({**CHECKED_SIZES[0], **own} for own in self.further)]):
            more = {symbol: 1 + 2 * number * self.steps.get(symbol, 1) for symbol in symbols}
            sizes = {symbol: chosen.get(symbol, self.traced_sizes[symbol] + more[symbol]) for symbol in symbols}
            sizes |= {symbol: size for symbol, size in fixed.items() if symbol != "sequence"}
            sizes = self.derive(sizes) if self.derive else sizes
            for ranges in (self.limits, limits or {}):
                for symbol, (low, high) in ranges.items():
                    if symbol in sizes:
                        least = max(sizes[symbol], low)
                        sizes[symbol] = least if high is None else min(least, high)
            sets.append({**sizes, **fixed})
        usual, further = sets[: len(CHECKED_SIZES)], sets[len(CHECKED_SIZES) :]
        tried = {symbol: [sizes[symbol] for sizes in usual] for symbol in symbols}
        return usual + [
            sizes for sizes in further if any(not min(own) <= sizes[each] <= max(own) for each, own in tried.items())
        ]


def in_dtype_of(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> ModelInputs:
    """The inputs with floats in the dtype of the module's first float parameter."""
    return in_dtype(next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32), inputs)


def in_dtype(dtype: torch.dtype, inputs: Mapping[str, torch.Tensor]) -> ModelInputs:
    """The inputs with floats in this dtype."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
