"""PEFT's kinds with random matrices that all layers share, and the numbers that PyTorch's generator gives for a seed.

Both PyTorch and NumPy use the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998). PyTorch seeds it with the lower
32 bits of the seed, as NumPy's `RandomState` does. Tests compare every function with PyTorch bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import Tensors
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.lora import LoraPair
from lora_export.pairs.computed import FactoredPair, PairFactors, RowChoice
from lora_export.pairs.open_shape import MatrixShape, OpenPair

WIDE_FROM = (1 << 32) // 20  # PyTorch shuffles so many numbers, or more, by draws of 64 bits
LANES = 16  # numbers that PyTorch makes normal at a time
FLOAT_BITS = 24  # of a draw that become a float32
DOUBLE_BITS = 53  # of two draws that become a float64


class Generator:
    """PyTorch's generator on the CPU, after `manual_seed`. Raises InputRefused for a seed that it does not take."""

    def __init__(self, seed: Any, name: str):
        if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
            raise InputRefused(f"{name} is {seed!r}; it must be an integer of 64 bits")
        self._twister = np.random.MT19937()
        state: Any = np.random.RandomState(seed % (1 << 32)).get_state(legacy=False)
        self._twister.state = state

    def _draws(self, count: int) -> NDArray[np.uint64]:
        """Draws of 32 bits."""
        return np.asarray(self._twister.random_raw(count))

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> NDArray[np.float32]:
        """`torch.empty(shape).uniform_(low, high)`.

        PyTorch multiplies and adds with one rounding (FMA), which fp64 does here. On a processor without that, the last
        bit of some of PyTorch's numbers is another one.
        """
        unit = (self._draws(math.prod(shape)) & np.uint64((1 << FLOAT_BITS) - 1)) * 2.0**-FLOAT_BITS
        width = np.float64(np.float32(high) - np.float32(low))
        return (unit * width + np.float64(np.float32(low))).astype(np.float32).reshape(shape)

    def normal(self, shape: tuple[int, ...], deviation: float) -> NDArray[np.float32]:
        """`torch.empty(shape).normal_(0, deviation)`, but for the last bits.

        PyTorch makes eight pairs of 16 uniform numbers at a time (Box and Muller 1958). The last 16 are drawn anew,
        where the number of all is no multiple of 16. Fewer than 16 are made one pair after the other, in fp64; of an
        odd number of these, the next draw of PyTorch begins with the last pair's other number, and this one does not.
        """
        size = math.prod(shape)
        if size < LANES:
            return (self._few_normal(size) * deviation).astype(np.float32).reshape(shape)
        values = self.uniform((size,), 0, 1)
        rest, normal = size % LANES, np.empty(size, np.float32)
        normal[: size - rest] = _box_muller(values[: size - rest].reshape(-1, LANES)).reshape(-1)
        if rest:
            normal[-LANES:] = _box_muller(self.uniform((1, LANES), 0, 1)).reshape(-1)
        return (normal * np.float32(deviation)).reshape(shape)

    def _few_normal(self, size: int) -> NDArray[np.float64]:
        """Normal numbers of deviation 1. Each pair is made of two numbers of 53 bits, the angle's first."""
        high, low = self._draws(4 * -(-size // 2)).reshape(-1, 2).T
        unit = (((high << np.uint64(32)) | low) & np.uint64((1 << DOUBLE_BITS) - 1)) * 2.0**-DOUBLE_BITS
        angle, radius = 2 * np.pi * unit[::2], np.sqrt(-2 * np.log1p(-unit[1::2]))
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:size]

    def start_of_permutation(self, size: int, count: int) -> NDArray[np.int64]:
        """`torch.randperm(size)[:count]`: the first steps of a Fisher-Yates shuffle settle the first numbers.

        Raises InputRefused for a size from which on PyTorch shuffles in another way, whose last step settles them.
        """
        if size >= WIDE_FROM:
            raise InputRefused(f"PyTorch shuffles {size:,} numbers in another way than is known here")
        draws = self._draws(count)
        moved: dict[int, int] = {}  # place -> the number there, where it is not the place itself
        first = np.empty(count, np.int64)
        for step, draw in enumerate(draws.tolist()):
            other = step + draw % (size - step)
            first[step] = moved.get(other, other)
            moved[other] = moved.get(step, step)
        return first


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normal numbers of uniform ones, (blocks, 16)."""
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, : LANES // 2])), 2 * np.pi * uniform[:, LANES // 2 :]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


PROJECTION_SEED = "projection_prng_key"
Projections = tuple[NDArray[np.float32], NDArray[np.float32]]  # A (rank, most inputs) and B (most outputs, rank)


def _projections(stored: Stored, rows: int, rank: int, shapes: Sequence[MatrixShape], name: str) -> Projections:
    """The shared A (rows, inputs) and B (outputs, rank): those of the file, else those that PEFT draws.

    They are Kaiming-uniform (He et al. 2015, eq. 10). PEFT draws them on the CPU in float32, A first. Raises
    InputRefused for shared tensors of which one is missing, or that do not fit the rank.
    """
    names = (f"{name}_A", f"{name}_B")
    if any(each in stored.shared for each in names):
        a, b = (stored.shared[each] if each in stored.shared else np.zeros(0) for each in names)
        if a.ndim != 2 or b.ndim != 2 or (len(a), b.shape[1]) != (rows, rank):
            raise InputRefused(f"{names[0]} {a.shape} and {names[1]} {b.shape} disagree with the rank {rank}")
        return np.asarray(a, np.float32), np.asarray(b, np.float32)
    most_outputs, most_inputs = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    return _drawn_projections(stored.config.get(PROJECTION_SEED), (rows, most_inputs), (most_outputs, rank))


@functools.lru_cache(maxsize=1)  # all layers have the same
def _drawn_projections(seed: Any, *shapes: tuple[int, int]) -> Projections:
    generator = Generator(seed, PROJECTION_SEED)
    # The fans of both are their inputs, each the second size.
    bounds = (math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan)) for _, fan in shapes)
    a, b = (generator.uniform(shape, -bound, bound) for shape, bound in zip(shapes, bounds, strict=True))
    return a, b


def _scaled_projections(
    of_rank: NDArray[np.float32], of_outputs: NDArray[np.float32], shape: MatrixShape, shared: Projections
) -> LoraPair:
    """diag(of_outputs) B diag(of_rank) A, of the parts of A and B that the weight needs."""
    rank, (out, columns) = len(of_rank), shape
    a, b = shared
    if a.shape[1] < columns or len(b) < out:
        raise InputRefused(f"the weight is {shape}, the shared matrices are for ({len(b)}, {a.shape[1]}) at most")
    stored = {"of_rank": of_rank, "of_outputs": of_outputs}

    def factors(own: Tensors, rows: RowChoice) -> PairFactors:
        return own["of_rank"][:, None] * a[:rank, :columns], own["of_outputs"][rows, None] * b[:out][rows, :rank]

    return FactoredPair(stored, 1.0, settings={"shape": (rank, out, columns), "factors": factors})


def vera(stored: Stored, name: str = "vera", times: int = 1) -> OpenPair:
    """VeRA: random matrices that all layers share, and two trained vectors for each layer (Kopiczko et al. 2024).

    The tensors have this `name`. A has so many `times` the rank; the first part is used.
    """
    of_rank, of_outputs = stored.part(f"{name}_lambda_d", 1), stored.part(f"{name}_lambda_b", 1)
    rank = stored.config["r"]
    if len(of_rank) != times * rank:
        raise InputRefused(
            f"{name}_lambda_d has {len(of_rank)} values, and needs {times * rank} by the config's rank {rank}"
        )
    Generator(stored.config.get(PROJECTION_SEED), PROJECTION_SEED)

    def pair(shape: MatrixShape, shapes: Sequence[MatrixShape]) -> LoraPair:
        shared = _projections(stored, times * rank, rank, shapes, name)
        return _scaled_projections(of_rank[:rank], of_outputs, shape, shared)

    return OpenPair(pair, [of_rank[:rank], of_outputs], len(of_outputs))


def pvera(stored: Stored) -> OpenPair:
    """PVeRA: VeRA with a trained distribution. Its mean is read, with which PEFT computes when it does not sample."""
    return vera(stored, "pvera", times=2)


def randlora(stored: Stored) -> OpenPair:
    """RandLoRA: a sum of scaled random matrices that all layers share, of full rank together (Albert et al. 2025).

    Sparse ones have -1, 0 and 1, divided by their deviation. They are drawn from the seed where the file lacks them.
    """
    weights, gamma = stored.part("randlora_lambda", 2), stored.part("randlora_gamma", 2)
    tensors = {**stored.shared, **stored.parts}  # PEFT saves them once, and again for each layer
    rank, (bases, least) = stored.config["r"], gamma.shape
    saved = [np.asarray(tensors[name], np.float32) for name in ("randlora_A", "randlora_B") if name in tensors]
    if len(saved) < 2 and not (stored.config.get("sparse") or stored.config.get("very_sparse")):
        raise InputRefused(
            "its random matrices are not saved, and PEFT draws them in a type that depends on the device. Save the "
            "adapter with save_projection=True"
        )
    if weights.shape != (rank, bases):
        raise InputRefused(f"randlora_lambda {weights.shape} and randlora_gamma {gamma.shape} disagree")
    scale = adapter_scale(rank, stored.config["randlora_alpha"], {})
    Generator(stored.config.get(PROJECTION_SEED), PROJECTION_SEED)

    def pair(shape: MatrixShape, shapes: Sequence[MatrixShape]) -> LoraPair:
        most = max(shape)
        a, b = saved if len(saved) == 2 else _drawn(stored, rank, shapes)
        if a.ndim != 3 or a.shape[:2] != (rank, 1) or b.ndim != 3 or b.shape[2] != rank:
            raise InputRefused(f"randlora_A {a.shape} and randlora_B {b.shape} disagree with the rank {rank}")
        if min(shape) != least or a.shape[2] < least or len(b) < most or b.shape[1] < bases:
            raise InputRefused(f"the weight is {shape}, the adapter was trained on one with {least} inputs or outputs")
        # PEFT flattens the two axes of both in different orders.
        wide = b[:most, :bases].reshape(most, rank * bases)

        def factors(own: Tensors, rows: RowChoice) -> PairFactors:
            narrow = (own["weights"][:, :, None] * a[:, :, :least] * own["gamma"]).reshape(rank * bases, least)
            return (narrow, wide[rows]) if shape[1] == least else (wide.T, narrow.T[rows])

        settings = {"shape": (rank * bases, *shape), "factors": factors}
        return FactoredPair({"weights": weights, "gamma": gamma}, scale, settings=settings)

    return OpenPair(pair, [weights, gamma])


def _drawn(stored: Stored, rank: int, shapes: Sequence[MatrixShape]) -> Sequence[NDArray[np.float32]]:
    """A (rank, 1, inputs) and B (outputs, bases, rank) that PEFT draws for a seed, A first."""
    least, most = sorted(max(shape[axis] for shape in shapes) for axis in (0, 1))
    sparsity = math.sqrt(least) if stored.config.get("very_sparse") else 3
    generator = Generator(stored.config.get(PROJECTION_SEED), PROJECTION_SEED)
    found, part = [], 1 / (2 * sparsity)
    for size in ((rank, 1, least), (most, -(-least // rank), rank)):
        uniform = generator.uniform(size, 0, 1)
        signs = (uniform > np.float32(1 - part)).astype(np.float32) - (uniform < np.float32(part))
        found.append((signs / np.std(signs, dtype=np.float64, ddof=1)).astype(np.float32))
    return found
