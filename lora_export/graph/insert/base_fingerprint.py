"""Fingerprints of a graph's base weights, which identify the base that an adapter file was made for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.find_sites import Sites
from lora_export.graph.site import Site
from lora_export.storage.hashes import ALGORITHMS, FAST


def weight_digests(sites: Sites) -> dict[str, str]:
    """A hash of every named weight, in the orientation of the model. Reads all weights.

    Of a quantised weight the stored tensors are hashed: integers, scales and zero points, neighbouring blocks included.
    """
    of_packed_nodes: dict[ir.Node, str] = {}
    return {name: _weight_digest(main_site(own_sites), of_packed_nodes) for name, own_sites in sites.by_name.items()}


def fingerprint(digests: dict[str, str]) -> str:
    """One hash of all weights, independent of their order."""
    return hash_parts(digests.items())


def names_digest(sites: Sites) -> str:
    """A hash of all weights' names and quantisation. Only graphs that agree in it have comparable fingerprints."""
    return hash_parts(_names(sites))


def main_site(sites: Sequence[Site]) -> Site:
    """The first linear site, or the first one."""
    return min(sites, key=lambda site: not site.is_linear)


def quantisation_of(site: Site) -> str:
    """How the weight is quantised, in words. Empty where it is not."""
    return site.quantised.kind if site.quantised is not None else ""


def _names(sites: Sites) -> Iterator[str]:
    for name, own_sites in sites.by_name.items():
        kind = quantisation_of(main_site(own_sites))
        yield f"{name}, {kind}" if kind else name


def _weight_digest(site: Site, of_packed_nodes: dict[ir.Node, str]) -> str:
    if site.quantised is None:
        return _hash_arrays([np.ascontiguousarray(site.matrix)])
    node = site.quantised.node
    if node not in of_packed_nodes:
        # Inputs after these are no part of the weight: DoRA removes the bias.
        tensors = [None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs[:4]]
        of_packed_nodes[node] = _hash_arrays([tensor.numpy() for tensor in tensors if tensor is not None])
    block = site.block and (site.block.start, site.block.stop)
    return hash_parts([of_packed_nodes[node], quantisation_of(site), site.stored_shape, block])


def _hash_arrays(arrays: Iterable[NDArray[Any]]) -> str:
    digest = ALGORITHMS[FAST]()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_parts(parts: Iterable[object]) -> str:
    """One hash of all parts, independent of their order."""
    digest = ALGORITHMS[FAST]()
    for part in sorted(map(repr, parts)):
        digest.update(part.encode())
    return digest.hexdigest()
