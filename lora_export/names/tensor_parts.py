"""What a converter makes of stored tensors, entry by entry, without their values.

A converter of transformers splits, joins, stacks, transposes or permutes tensors while it loads them. `AssembledTensor`
is such a result: each of its pieces is a set of entries of one stored tensor, with their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora_export.names.architecture import RenameRule
from lora_export.names.row_orders import Indices, alternating, halves_of_heads, pairs_of_heads, two_blocks


class NotExpressible(Exception):
    """A converter cannot be expressed as a rearrangement of entries. The message is why, as the end of a sentence."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Entries of one stored tensor within an assembled one.

    For each axis of the assembled tensor: which positions the piece has there, and from which axis of the stored tensor
    they come (None where stacking made the axis), at which indices. `fixed` has the index on every other axis of the
    stored tensor, where the assembled tensor is a slice.
    """

    source: str
    positions: tuple[Indices, ...]
    axes: tuple[int | None, ...]
    indices: tuple[Indices, ...]
    fixed: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AssembledTensor:
    """A tensor that consists of entries of stored tensors."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def stored(cls, name: str, shape: Sequence[int]) -> AssembledTensor:
        """A stored tensor itself."""
        every = tuple(np.arange(size) for size in shape)
        return cls(tuple(shape), (Piece(name, every, tuple(range(len(shape))), every),))

    @property
    def order(self) -> tuple[int | None, ...]:
        """The axes of the one stored tensor that this is, transposed at most; empty where it is none."""
        first, *others = self.pieces
        is_in_order = all(map(np.array_equal, first.positions, first.indices))
        return first.axes if is_in_order and not others and not first.fixed else ()

    def permuted(self, axis: int, order: Indices) -> AssembledTensor:
        """The tensor T' with T'[k] = T[order[k]] along an axis."""
        places = np.argsort(order)
        moved = (
            replace(piece, positions=_with(piece.positions, axis, places[piece.positions[axis]]))
            for piece in self.pieces
        )
        return AssembledTensor(self.shape, tuple(moved))

    def part(self, axis: int, start: int, stop: int) -> AssembledTensor:
        """The positions from `start` to `stop` along an axis."""
        pieces = []
        for piece in self.pieces:
            inside = (piece.positions[axis] >= start) & (piece.positions[axis] < stop)
            if inside.any():
                positions = _with(piece.positions, axis, piece.positions[axis][inside] - start)
                pieces.append(
                    replace(piece, positions=positions, indices=_with(piece.indices, axis, piece.indices[axis][inside]))
                )
        return AssembledTensor(_with(self.shape, axis, stop - start), tuple(pieces))

    def along_first_axis(self) -> list[AssembledTensor]:
        """The slices T[0], T[1], ... along the first axis."""
        pieces: list[list[Piece]] = [[] for _ in range(self.shape[0])]
        for piece in self.pieces:
            for position, index in zip(piece.positions[0].tolist(), piece.indices[0].tolist(), strict=True):
                fixed = piece.fixed if piece.axes[0] is None else {**piece.fixed, piece.axes[0]: index}
                pieces[position].append(
                    Piece(piece.source, piece.positions[1:], piece.axes[1:], piece.indices[1:], fixed)
                )
        return [AssembledTensor(self.shape[1:], tuple(each)) for each in pieces]

    def transposed(self, one: int, other: int) -> AssembledTensor:
        order = list(range(len(self.shape)))
        order[one], order[other] = order[other], order[one]

        def swap(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[axis] for axis in order)

        pieces = (
            replace(each, positions=swap(each.positions), axes=swap(each.axes), indices=swap(each.indices))
            for each in self.pieces
        )
        return AssembledTensor(swap(self.shape), tuple(pieces))


def _with(values: tuple[Any, ...], axis: int, value: Any) -> tuple[Any, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def joined(tensors: Sequence[AssembledTensor], axis: int) -> AssembledTensor:
    """Tensors one after another along an axis. Raises NotExpressible where their other sizes differ."""
    pieces, start = [], 0
    for tensor in tensors:
        if _with(tensor.shape, axis, 0) != _with(tensors[0].shape, axis, 0):
            raise NotExpressible(f"joins tensors of different shapes, {tensors[0].shape} and {tensor.shape}")
        for piece in tensor.pieces:
            pieces.append(replace(piece, positions=_with(piece.positions, axis, piece.positions[axis] + start)))
        start += tensor.shape[axis]
    return AssembledTensor(_with(tensors[0].shape, axis, start), tuple(pieces))


def stacked(tensors: Sequence[AssembledTensor]) -> AssembledTensor:
    """Tensors of one shape along a new first axis."""
    new = []
    for tensor in tensors:
        zero = np.zeros(1, np.int64)
        pieces = (
            Piece(each.source, (zero, *each.positions), (None, *each.axes), (zero, *each.indices), each.fixed)
            for each in tensor.pieces
        )
        new.append(AssembledTensor((1, *tensor.shape), tuple(pieces)))
    return joined(new, 0)


# --- The operations of a converter ---

Collected = dict[str, list[AssembledTensor]]  # by the pattern of the rule


SizeOf = Callable[[str, int], int | None]


def converted(
    rule: RenameRule, collected: Collected, config: Mapping[str, Any], size_of: SizeOf = lambda *_: None
) -> dict[str, AssembledTensor]:
    """What the operations of a converter make of the tensors that each of its patterns collected, by target.

    `size_of` has the size of a target along an axis, where it is known. Raises NotExpressible for an operation that is
    not a rearrangement, or that needs sizes which are not known.
    """
    operations = _Operations(rule, config, size_of)
    for operation in rule.operations:
        name, fields = operation["name"], {key: value for key, value in operation.items() if key != "name"}
        if name not in OPERATIONS:
            raise NotExpressible(f"uses the operation {name}, which needs more than the stored tensors")
        collected = OPERATIONS[name](operations, collected, **fields)
    results = {}
    for target, tensors in collected.items():
        if len(tensors) != 1:
            raise NotExpressible(f"leaves {len(tensors)} tensors for one name")
        results[target] = tensors[0]
    return results


@dataclass(frozen=True)
class _Operations:
    """The operations of transformers by name, with the fields that the table has of them."""

    rule: RenameRule
    config: Mapping[str, Any]
    size_of: SizeOf

    def split(self, collected: Collected, dim: int = 0) -> Collected:
        tensor = _only_tensor(collected)
        sizes = {target: self.size_of(target, dim) for target in self.rule.targets}
        unknown = [target for target, size in sizes.items() if size is None]
        known = sum(size for size in sizes.values() if size is not None)
        if len(unknown) > 1:
            raise NotExpressible(
                f"splits {tensor.shape[dim]} rows, and the sizes of {', '.join(unknown)} are not known"
            )
        sizes |= dict.fromkeys(unknown, tensor.shape[dim] - known)  # the rest
        total = sum(size for size in sizes.values() if size is not None)
        if total != tensor.shape[dim] or any(size is None or size < 1 for size in sizes.values()):
            raise NotExpressible(f"splits {tensor.shape[dim]} rows, and the adapter was trained on {known}")
        result, start = Collected(), 0
        for target, size in sizes.items():
            assert size is not None
            result[target] = [tensor.part(dim, start, start + size)]
            start += size
        return result

    def chunk(self, collected: Collected, dim: int = 0, num_shards_attribute: str = "") -> Collected:
        tensor = _only_tensor(collected)
        if num_shards_attribute:
            raise NotExpressible(f"splits into as many tensors as {num_shards_attribute} in the config")
        count, size = len(self.rule.targets), tensor.shape[dim]
        if size % count:
            raise NotExpressible(f"splits {size} rows into {count} parts of equal size")
        step = size // count
        return {target: [tensor.part(dim, k * step, (k + 1) * step)] for k, target in enumerate(self.rule.targets)}

    def concatenate(self, collected: Collected, dim: int = 0, **_: Any) -> Collected:
        tensors = [tensor for source in self.rule.sources for tensor in collected.get(source, ())]
        return {self.rule.targets[0]: [joined(tensors, dim)]}

    def merge_modules(self, collected: Collected, dim: int = 0) -> Collected:
        if dim != 0:
            raise NotExpressible("stacks tensors along an axis other than the first")
        alone = len(self.rule.sources) == 1
        return {self.rule.targets[0] if alone else source: [stacked(each)] for source, each in collected.items()}

    def transpose(self, collected: Collected, dim0: int = 0, dim1: int = 1, check_dims: bool = False) -> Collected:
        tensor = _only_tensor(collected)
        target = self.rule.sources[0] if len(self.rule.targets) > 1 else self.rule.targets[0]
        transposed = tensor.transposed(dim0, dim1)
        if check_dims:
            shape = tuple(self.size_of(target, axis) for axis in range(len(tensor.shape)))
            if shape not in (tensor.shape, transposed.shape):
                raise NotExpressible("transposes a tensor only where its shape is not that of the model")
            transposed = tensor if shape == tensor.shape else transposed
        return {target: [transposed]}

    def interleave(self, collected: Collected, dim: int = 0, inverse: bool = False) -> Collected:
        tensor = _only_tensor(collected)
        order = (alternating if inverse else two_blocks)(tensor.shape[dim])
        return {self.rule.targets[0]: [tensor.permuted(dim, order)]}

    def permute_for_rope(
        self,
        collected: Collected,
        subconfig_key: str | None = None,
        permute_layer_names: Sequence[str] | None = None,
        inverse: bool = False,
    ) -> Collected:
        own = self.config.get(subconfig_key) if subconfig_key else None
        heads = (own if isinstance(own, Mapping) else self.config).get("num_attention_heads")
        if not isinstance(heads, int) or heads < 1:
            raise NotExpressible("permutes the rows of heads, and the config does not state num_attention_heads")
        one_to_many = (len(self.rule.targets) > 1) != (len(self.rule.sources) > 1)
        result: Collected = {}
        for source, tensors in collected.items():
            is_permuted = permute_layer_names is None or any(name in source for name in permute_layer_names)
            permuted = []
            for tensor in tensors:
                size = tensor.shape[0]
                if is_permuted and (len(tensor.shape) > 2 or size % (2 * heads)):
                    raise NotExpressible(f"permutes the rows of {heads} heads, and the shape is {tensor.shape}")
                order = (pairs_of_heads if inverse else halves_of_heads)(size, heads) if is_permuted else None
                permuted.append(tensor if order is None else tensor.permuted(0, order))
            result[source if one_to_many else self.rule.targets[0]] = permuted
        return result


def _only_tensor(collected: Collected) -> AssembledTensor:
    tensors = [tensor for each in collected.values() for tensor in each]
    if len(tensors) != 1:
        raise NotExpressible(f"works on one tensor, and {len(tensors)} were found")
    return tensors[0]


OPERATIONS: dict[str, Callable[..., Collected]] = {
    "Chunk": _Operations.chunk,
    "Split": _Operations.split,
    "Concatenate": _Operations.concatenate,
    "MergeModulelist": _Operations.merge_modules,
    "Transpose": _Operations.transpose,
    "Interleave": _Operations.interleave,
    "PermuteForRope": _Operations.permute_for_rope,
}
