"""A graph whose batches mix adapters, judged row by row by the proofs of whole batches with one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import Undecided
from lora_export.formats.row_adapters import without_absent
from lora_export.runtime.runner import Arrays, Runner
from lora_export.verification import parity
from lora_export.verification.compare_outputs import named_as


def mixed_cases(
    candidate: Runner,
    inputs: Mapping[str, Arrays],
    whole: Sequence[Sequence[parity.Case]],
    order: Sequence[int],
    labels: Sequence[str] | None = None,
) -> tuple[parity.Case, ...]:
    """Run a candidate whose rows have different adapters, over and over along the batch.

    `whole` holds the cases of whole batches whose rows all have the same adapters, on the same inputs, the base's
    first. `order` has for each row its place there, and `labels` may name the places. Raises Undecided where no output
    has a row for each row of the batch.
    """
    cases = []
    for number, (name, arrays) in enumerate(inputs.items()):
        alone = [own[number] for own in whole]
        batch = len(next(iter(arrays.values())))
        by_row = [key for key, value in alone[0].reference.items() if value.ndim and len(value) == batch]
        if not by_row:
            raise Undecided(f"no output has a row for each row of the batch ({name}): a mixed batch cannot be judged")
        outputs = named_as(alone[0].reference, candidate.run(arrays))
        places = np.resize(np.array(order), batch)
        label = ", ".join(str(place) if labels is None else labels[place] for place in places)
        cases.append(_mixed(alone, places, {key: outputs[key] for key in by_row}, label))
    return tuple(cases)


def _by_labels(key: str, references: Sequence[NDArray[Any]]) -> dict[str, list[int]]:
    """The rows of an output, by a name for those of one shape: heads may have different numbers of labels."""
    if len({reference.shape for reference in references}) == 1:
        return {key: list(range(len(references)))}
    groups: dict[str, list[int]] = {}
    for row, reference in enumerate(references):
        groups.setdefault(f"{key}, {reference.shape[-1]} labels", []).append(row)
    return groups


def _without_adapter(base: parity.Case, case: parity.Case) -> parity.Outputs:
    """The base's outputs beside those of a case. A head with other labels is compared without the adapter's pairs."""
    off = case.base or case.reference
    return {
        key: value if value.shape == case.reference[key].shape else off[key] for key, value in base.reference.items()
    }


def _mixed(alone: Sequence[parity.Case], ids: NDArray[Any], outputs: Arrays, label: str) -> parity.Case:
    """A case in which every row of every run is the row of the case of its adapter."""
    groups = {key: _by_labels(key, [alone[chosen].reference[key] for chosen in ids]) for key in outputs}
    unjudged = alone[0].unjudged

    def judged(array: NDArray[Any], group: Sequence[int], *, is_whole: bool) -> NDArray[Any]:
        """The positions of some rows that are judged; `parity.Case` finds those of a whole batch itself."""
        if is_whole or unjudged is None or array.ndim < 3 or array.shape[:2] != unjudged[group].shape:
            return array
        positions: NDArray[Any] = array[~unjudged[group]]
        return positions

    def rows(runs: Sequence[parity.Outputs]) -> Arrays:
        return {
            name: judged(np.stack([runs[ids[row]][key][row] for row in group]), group, is_whole=len(own) == 1)
            for key, own in groups.items()
            for name, group in own.items()
        }

    def candidate_rows(key: str, group: Sequence[int], *, is_whole: bool) -> NDArray[Any]:
        """The candidate's rows, without the labels that their heads do not have."""
        labels = alone[ids[group[0]]].reference[key].shape[-1]
        return judged(without_absent(outputs[key][group], labels), group, is_whole=is_whole)

    return parity.Case(
        name=f"{alone[0].name}, adapters {label}",
        inputs_summary=alone[0].inputs_summary,
        reference=rows([case.reference for case in alone]),
        deployed=rows([case.deployed for case in alone]),
        candidate={
            name: candidate_rows(key, group, is_whole=len(own) == 1)
            for key, own in groups.items()
            for name, group in own.items()
        },
        base=rows([_without_adapter(alone[0], case) for case in alone]),
        scaled=rows([case.scaled or case.reference for case in alone]),
        peer=alone[-1].peer,
        unjudged=unjudged,
        unjudged_by_output=_unjudged_rows(alone, ids),
    )


def _unjudged_rows(alone: Sequence[parity.Case], ids: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Output -> the positions that are not judged: of every row, those of the case of its adapter."""
    by_output: dict[str, NDArray[np.bool_]] = {}
    for number, case in enumerate(alone):
        for name, positions in case.unjudged_by_output.items():
            own = by_output.setdefault(name, np.zeros_like(positions))
            own[ids == number] = positions[ids == number]
    return by_output
