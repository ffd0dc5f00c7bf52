"""PEFT's kinds with random matrices that all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import Tensors
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.formats.peft_kinds.torch_random import Generator
from lora_export.lora import LoraPair
from lora_export.pairs.computed import FactoredPair, PairFactors, RowChoice
from lora_export.pairs.open_shape import MatrixShape, OpenPair

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
    generator = Generator(stored.config.get(PROJECTION_SEED), PROJECTION_SEED)
    most_outputs, most_inputs = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    bounds = (math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan)) for fan in (most_inputs, rank))
    drawn = ((rows, most_inputs), (most_outputs, rank))
    a, b = (generator.uniform(shape, -bound, bound) for shape, bound in zip(drawn, bounds, strict=True))
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
    """VeRA: random matrices that all layers share, and two trained vectors for each layer (Kopiczko et al. 2024)."""
    """The change by the tensors of this name. A has so many times the rank; the first part is used."""
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
