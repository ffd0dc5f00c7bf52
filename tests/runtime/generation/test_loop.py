"""The loop of generation: batches, padding, ends, and what is passed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lora_export.models.load import load_model
from lora_export.runtime.generation.decoder import Decoder
from lora_export.runtime.generation.loop import TextLimits, generate_tokens
from lora_export.runtime.generation.sampling import Sampling
from support import FACTORIES
from support.decoders import a_graph

PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder(a_graph(tmp_path_factory.mktemp("sums") / "m.onnx", load_model(f"{FACTORIES}:sums")))


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """The most probable token of the sums of all rows so far, again and again."""
    module: Any = load_model(f"{FACTORIES}:sums").module
    table, turned = module.table.weight.detach().numpy(), module.dense.weight.detach().numpy().T
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int((table[tokens].sum(0) @ turned).argmax()))
    return tokens[len(prompt) :]


def generated(decoder: Decoder, prompts: Sequence[Sequence[int]], limits: TextLimits) -> list[list[int]]:
    return generate_tokens(decoder, prompts, limits, Sampling(), lambda _, __: None)


def test_padded_batch_gives_what_each_prompt_gives_alone(decoder: Decoder) -> None:
    found = generated(decoder, PROMPTS, TextLimits((), 12))
    assert found == [expected(prompt, 12) for prompt in PROMPTS]


def test_graph_that_takes_no_padding_runs_in_batches_of_one_length(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "takes_padding", False)
    started: list[int] = []
    start = decoder.start
    monkeypatch.setattr(decoder, "start", lambda batch, *rest: (started.append(batch), start(batch, *rest))[1])
    found = generated(decoder, [*PROMPTS, [1, 1, 1]], TextLimits((), 5))
    assert found == [expected(prompt, 5) for prompt in [*PROMPTS, [1, 1, 1]]]
    assert started == [2, 1, 1]


def test_text_ends_with_its_token_and_the_others_go_on(decoder: Decoder) -> None:
    texts = [expected(prompt, 12) for prompt in PROMPTS]
    end = next(token for token in range(3) if len({text.index(token) for text in texts if token in text}) > 1)
    found = generated(decoder, PROMPTS, TextLimits({end}, 12))
    for text, whole in zip(found, texts, strict=True):
        assert text == (whole[: whole.index(end) + 1] if end in whole else whole)


def test_every_token_is_passed_on_as_it_is_chosen(decoder: Decoder) -> None:
    events: list[tuple[int, int]] = []
    found = generate_tokens(
        decoder, PROMPTS[:2], TextLimits((), 3), Sampling(), lambda row, token: events.append((row, token))
    )
    assert [row for row, _ in events] == [0, 1] * 3
    assert [[token for row, token in events if row == number] for number in range(2)] == found


def test_seeded_draws_do_not_depend_on_the_batch(decoder: Decoder) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    both = generate_tokens(decoder, PROMPTS[:2], TextLimits((), 20), sampling, lambda _, __: None)
    alone = generate_tokens(decoder, PROMPTS[:1], TextLimits((), 20), sampling, lambda _, __: None)
    assert both[0] == alone[0]
    assert len(np.unique(both[0])) > 1


def test_draws_do_not_depend_on_which_prompts_run_together(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    together = generate_tokens(decoder, PROMPTS, TextLimits((), 20), sampling, lambda _, __: None)
    monkeypatch.setattr(decoder, "takes_padding", False)
    assert generate_tokens(decoder, PROMPTS, TextLimits((), 20), sampling, lambda _, __: None) == together
