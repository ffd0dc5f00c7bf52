"""A graph whose batches mix adapters, judged row by row by the proofs of whole batches with one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import Undecided
from lora_export.runtime.runner import Arrays, Runner
from lora_export.verification import parity
from lora_export.verification.compare_outputs import named_as


def mixed_cases(
    candidate: Runner, inputs: Mapping[str, Arrays], by_id: Sequence[Sequence[parity.Case]], ids: Sequence[int]
) -> tuple[parity.Case, ...]:
    """Run a candidate whose rows have the adapters `ids`, over and over along the batch.

    `by_id` holds for each id, the base's first, the cases of whole batches with this adapter on the same inputs.
    Raises Undecided where no output has a row for each row of the batch.
    """
    cases = []
    for number, (name, arrays) in enumerate(inputs.items()):
        alone = [own[number] for own in by_id]
        batch = len(next(iter(arrays.values())))
        by_row = [key for key, value in alone[0].reference.items() if value.ndim and len(value) == batch]
        if not by_row:
            raise Undecided(f"no output has a row for each row of the batch ({name}): a mixed batch cannot be judged")
        outputs = named_as(alone[0].reference, candidate.run(arrays))
        cases.append(_mixed(alone, np.resize(np.array(ids), batch), {key: outputs[key] for key in by_row}))
    return tuple(cases)


def _mixed(alone: Sequence[parity.Case], ids: NDArray[Any], outputs: Arrays) -> parity.Case:
    """A case in which every row of every run is the row of the case of its adapter."""

    def rows(runs: Sequence[parity.Outputs]) -> Arrays:
        return {key: np.stack([runs[chosen][key][row] for row, chosen in enumerate(ids)]) for key in outputs}

    return parity.Case(
        name=f"{alone[0].name}, adapters {', '.join(map(str, ids))}",
        inputs_summary=alone[0].inputs_summary,
        reference=rows([case.reference for case in alone]),
        deployed=rows([case.deployed for case in alone]),
        candidate=outputs,
        base=rows([alone[0].reference for _ in alone]),
        scaled=rows([case.scaled or case.reference for case in alone]),
        peer=alone[-1].peer,
        unjudged=alone[0].unjudged,
    )
