"""The values of a program's adapter inputs, one safetensors file an adapter.

A program (.pte) that `torchscript` made with `lora="inputs"` takes A (rank, in) and B (out, rank) of each layer, with
the scale in B, after the model's own inputs. The file has all of them, by their names, which are PEFT's: so it is an
adapter that other commands read, too (see `openvino`). Where an adapter does not change a layer, it has zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused, MatchError, count, listed
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import AdapterArrays, Contract, read_contract
from lora_export.formats.peft_keys import SCALE_IN_B
from lora_export.lora import Adapter
from lora_export.options.spelling import command, named
from lora_export.plan import Layout, Plan
from lora_export.plan.match_tensors import NO_WEIGHT
from lora_export.provenance import CONTRACT_KEY
from lora_export.storage import safetensors_file
from lora_export.storage.safetensors_file import TensorFile

SUFFIX = ".safetensors"
# In the header: the SHA-256 of the base's weights, and of the trained adapter
BASE_KEY, ADAPTER_KEY = "lora_export.base", "lora_export.adapter"
GREATEST_RANK = 1 << 16  # which a record may claim: arrays of it are made before a program is run


def contract_of(program: Path, metadata: Mapping[str, str]) -> Contract:
    """The adapter inputs that a program records. Raises InputRefused for a record that `torchscript` does not make."""
    contract = read_contract(metadata, program)
    problems = list(_strange_in(contract))
    if problems:
        raise InputRefused(f"{program}: its record of adapter inputs ({CONTRACT_KEY}) is damaged:", listed(problems))
    return contract


def _strange_in(contract: Contract) -> Iterator[str]:
    if not contract.required or contract.slots or not contract.places:
        yield "no inputs of one adapter that every run passes"
    names = Counter(name for place in contract.places for name in (place.a, place.b))
    yield from (f"{name}: {times} inputs have this name" for name, times in names.items() if times > 1)
    for place in contract.places:
        if not 0 < place.max_rank <= GREATEST_RANK:
            yield f"{place.weight}: a rank of {place.max_rank}"
        if not place.out_in or place.embedding or place.factor or place.scale:
            yield f"{place.weight}: inputs other than A (rank, in) and B (out, rank)"
        if place.dtype not in ("float32", "float64"):
            yield f"{place.weight}: inputs of {place.dtype}"


def refuse_kinds(steps: Plan) -> None:
    """Raise InputRefused for changes that are no inputs of a program. The message lists them."""
    onnx_adapter.refuse_beyond_low_rank(steps.adapters, "program")
    onnx_adapter.refuse_new_tables(steps, "program")
    activated = {adapter.name for adapter in steps.adapters if adapter.invocation_tokens}
    found = [
        f"{term.adapter}, {step.weight}: {why}"
        for step in steps.low_rank
        for term in step.terms
        for why in (
            *(["DoRA, whose factor follows from the weight"] if term.pair.magnitude is not None else []),
            *(["a pair of an embedding"] if step.spec.layout is Layout.EMBEDDING else []),
            *(["a pair of a part of a stored weight"] if step.spec.region is not None else []),
            *(["a pair that acts on some tokens alone"] if term.adapter in activated else []),
        )
    ]
    if found:
        raise InputRefused(
            "these changes cannot be inputs of a program:",
            listed(found),
            f"Merge such an adapter ({named('lora', 'merged')}), or keep A and B in the program "
            f"({named('lora', 'nodes')}).",
        )


def plan_for(contract: Contract, adapters: Sequence[Adapter], strengths: Sequence[float], program: Path) -> Plan:
    """Lay an adapter against the inputs of a program.

    Raises InputRefused for more than one, and, with every misfit, for what the program does not take.
    """
    if len(adapters) > 1:
        raise InputRefused(
            f"{program} takes one adapter at a time, and not {len(adapters)}: `{command('combine')}` makes one of them"
        )
    onnx_adapter.refuse_beyond_low_rank(adapters, "program")
    try:
        steps = plan.make(adapters, [place.spec for place in contract.places], strengths=strengths)
    except MatchError as error:
        raise error.with_words(NO_WEIGHT, "the program takes no adapter at").with_remedy(
            f"{program} takes adapters at {count(len(contract.places), 'layer')}, those of the adapters that it was "
            "exported with"
        ) from error
    refuse_kinds(steps)
    onnx_adapter.refuse_larger_ranks(steps, {place.weight: place.max_rank for place in contract.places}, "program")
    return steps


def values(contract: Contract, steps: Plan, adapter: str) -> dict[str, NDArray[Any]]:
    """The values of all inputs for one adapter of a plan. Raises InputRefused as `onnx_adapter.input_values` does."""
    return {**contract.without_adapter(), **onnx_adapter.input_values(contract, steps, adapter)}


def write(path: Path, arrays: AdapterArrays, contract: Contract, *, sha256: str) -> None:
    """Write one adapter's file into a folder that the caller publishes. `sha256` is that of the trained adapter."""
    origin = {BASE_KEY: contract.base, ADAPTER_KEY: sha256}
    safetensors_file.write(path, arrays, {"format": "pt", **SCALE_IN_B, **origin})


def adapter_sha256(path: Path) -> str:
    """The SHA-256 of the trained adapter of a file; empty where it has none. Raises InputRefused for another file."""
    return safetensors_file.open_file(path).metadata.get(ADAPTER_KEY, "")


def read(path: Path, contract: Contract, program: Path) -> dict[str, NDArray[Any]]:
    """The values of a file for the inputs of this program. Raises InputRefused, with every misfit, for another file."""
    file = safetensors_file.open_file(path)
    misfits = list(_misfits(file, contract))
    if misfits:
        raise InputRefused(
            f"{path} does not fit {program}:",
            listed(misfits),
            f"Make one that does from the trained adapter: `{command('convert', graph='MODEL.pte')}`",
        )
    return {name: file.read(name) for name in contract.inputs}


def _misfits(file: TensorFile, contract: Contract) -> Iterator[str]:
    if not SCALE_IN_B.items() <= file.metadata.items():
        yield "it is a trained adapter, whose scale is not in B"
    elif (base := file.metadata.get(BASE_KEY)) is None:
        yield "it does not state for which base it was made"
    elif base != contract.base:
        yield f"it was made for another base ({base[:12]}…, the program has {contract.base[:12]}…)"
    yield from (f"{name}: the program has no such input" for name in file.entries if name not in contract.inputs)
    for name, place in contract.inputs.items():
        wanted = f"{place.dtype} {list(contract.input_shapes[name])}"
        entry = file.entries.get(name)
        found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        if found != wanted:
            yield f"{name}: {found}, the program takes {wanted}"
        elif not np.isfinite(file.read(name)).all():
            yield f"{name}: it holds values that are not finite (NaN or infinity)"
