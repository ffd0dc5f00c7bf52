"""What the top-k operators of a decoder's graph choose, which is run with its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lora_export.models import model
from lora_export.models.load import load_model
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.verification.references.candidate_choices import ChosenByCase, choice_reader
from support import FACTORIES
from support.decoders import WORDS, a_graph

INPUTS = {"input_ids": np.arange(14).reshape(2, 7) % WORDS, "attention_mask": np.ones((2, 7), np.int64)}
LOGITS = "logits = MatMul (flat, turned)"
BY_TOKEN = "best, chosen = TopK <axis = 2> (logits, two)"
FLATTENED = """
  shape = Concat <axis = 0> (minus, three)
  flattened = Reshape (logits, shape)
  turned_logits = Transpose (flattened)
  best_of_all, chosen_of_all = TopK <axis = 0> (turned_logits, one)
"""


@pytest.fixture(scope="module")
def sums() -> model.Model:
    return load_model(f"{FACTORIES}:sums")


@pytest.mark.parametrize(
    ("operators", "chosen"),
    [
        pytest.param(BY_TOKEN + FLATTENED, [2, 1], id="by token, and flattened"),
        pytest.param("best, chosen = TopK <axis = 1> (input_ids, one)", None, id="of integers"),
        pytest.param("best, chosen = TopK <axis = 1> (logits, one)", None, id="not for each token"),
    ],
)
def test_choices_of_a_graph_with_a_cache(
    operators: str, chosen: Sequence[int] | None, sums: model.Model, tmp_path: Path
) -> None:
    """The prompt's, and those of the tokens after it."""
    added = LOGITS, f"minus = Neg (one)\n{LOGITS}\n{operators}"
    runner = with_cache(OnnxRunner(a_graph(tmp_path / "m.onnx", sums, added)))
    outputs = runner.run(INPUTS)
    found = _read(runner, outputs)
    ranks = np.argsort(-outputs["logits"], axis=-1)
    expected = None if chosen is None else {"a": [ranks[..., :k].tolist() for k in chosen]}
    as_lists = found if found is None else {case: [each.tolist() for each in own] for case, own in found.items()}
    assert as_lists == expected
    others = {"logits": outputs["logits"] + 1}
    assert _read(runner, others) is None


def _read(runner: Runner, outputs: Arrays) -> ChosenByCase | None:
    reader = choice_reader(runner)
    return None if reader is None else reader({"a": INPUTS}, {"a": outputs})
