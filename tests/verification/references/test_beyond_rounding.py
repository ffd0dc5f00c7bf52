"""Errors of PyTorch itself that rounding does not explain: an output with one is not decided, unless it is padding."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_export.verification.references.beyond_rounding import (
    notes_on_padding,
    outputs_beyond_rounding,
    padding_beyond_rounding,
)

MASK = np.array([[1, 1, 0], [1, 1, 1]])
TRUTH = np.array([[[1.0, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]])  # (batch, sequence, features)


def off_at(*positions: tuple[int, int], by: float = 1.0) -> NDArray[np.float32]:
    own = TRUTH.copy()
    for position in positions:
        own[position] += by
    return own.astype(np.float32)


def found(own: NDArray[np.float32], mask: NDArray[np.int64] = MASK) -> dict[str, list[list[int]]]:
    outputs = {"hidden": own, "pooled": own[:, 0]}
    truths = {"hidden": TRUTH, "pooled": TRUTH[:, 0]}
    by_case = padding_beyond_rounding({"a": outputs}, {"a": truths}, {"a": {"attention_mask": mask}}, "float32")
    return {name: np.argwhere(positions).tolist() for name, positions in by_case.get("a", {}).items()}


def test_padding_is_not_judged_where_pytorch_is_off() -> None:
    assert found(off_at((0, 2))) == {"hidden": [[0, 2]]}
    assert found(off_at((0, 2), (1, 1))) == {"hidden": [[0, 2]]}, "a token is judged"
    assert found(off_at((0, 2), by=1e-4)) == {}, "rounding may explain it"
    assert found(off_at((0, 2)), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])) == {}, "the mask is of other positions"
    assert found(off_at((0, 2)), np.zeros_like(MASK)) == {}, "without a token nothing tells the size of the output"
    assert padding_beyond_rounding({"a": {"y": off_at()}}, {"a": {"y": TRUTH}}, {"a": {}}, "float32") == {}


@pytest.mark.parametrize(("position", "doubts"), [((0, 2), 0), ((1, 1), 1)])
def test_an_output_is_undecided_unless_its_error_is_in_padding(position: tuple[int, int], doubts: int) -> None:
    deployed, reference = {"a": {"y": off_at(position)}}, {"a": {"y": TRUTH}}
    unjudged = padding_beyond_rounding(deployed, reference, {"a": {"attention_mask": MASK}}, "float32")
    texts = list(outputs_beyond_rounding(deployed, reference, unjudged, "float32"))
    assert len(texts) == doubts == 1 - len(notes_on_padding(unjudged))
    assert all("y in case a: PyTorch's own error is" in text for text in texts)
    assert len(list(outputs_beyond_rounding(deployed, reference, {}, "float32"))) == 1


def test_an_output_is_named_once_in_the_notes() -> None:
    positions = {"hidden": MASK == 0}
    (note,) = notes_on_padding({"a": positions, "b": positions})
    assert note.startswith("hidden was not judged at positions of padding")
