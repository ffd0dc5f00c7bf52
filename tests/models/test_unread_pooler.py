"""The pooler of an encoder that a checkpoint has no weights for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_export import layers
from lora_export.lora import Adapter, LoraPair
from lora_export.models.unread_pooler import without_unread_pooler
from support.generators import ENCODER_DECODERS

OWN = ("encoder.pooler.dense.weight", "encoder.pooler.dense.bias")


@pytest.fixture
def trocr() -> Any:
    torch.manual_seed(0)
    return ENCODER_DECODERS["trocr"]().eval()


def test_pooler_without_weights_is_removed_and_changes_nothing(trocr: Any) -> None:
    given = {"pixel_values": torch.ones(1, 3, 16, 16), "decoder_input_ids": torch.tensor([[1, 5]])}
    with torch.no_grad():
        before = trocr(**given).logits
        assert without_unread_pooler(trocr, (*OWN, "decoder.new.weight")) == ("decoder.new.weight",)
        assert trocr.encoder.pooler is None and torch.equal(trocr(**given).logits, before)


def test_pair_on_the_pooler_is_left_out_with_a_note(trocr: Any) -> None:
    without_unread_pooler(trocr, OWN)
    pair = LoraPair(a=torch.ones(2, 32).numpy(), b=torch.ones(32, 2).numpy(), scale=1.0)
    names = ["encoder.pooler.dense", "encoder.layers.0.mlp.fc1"]
    (found,) = layers.respelled_for(trocr, [Adapter(name="a", format="test", pairs=dict.fromkeys(names, pair))])
    assert list(found.pairs) == names[1:]
    assert found.notes == ("a changes encoder.pooler.dense, which no output of the model reads: left out",)


def test_pooler_with_weights_stays(trocr: Any) -> None:
    for new in ((), OWN[:1]):
        assert without_unread_pooler(trocr, new) == new and trocr.encoder.pooler is not None
    assert without_unread_pooler(torch.nn.Linear(2, 2), OWN) == OWN
