"""A served model is `same` only where it computes what PyTorch computes; what it serves instead is named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lora_export as le
from lora_export.errors import InputRefused, RuntimeRefused, WrongUsage
from support.cli import answer
from support.endpoints import (
    TEMPLATE,
    Folders,
    Logits,
    Served,
    save_adapter,
    save_base,
    served,
    serving,
    verified,
    with_peft,
)
from support.slow import slow

PROTOCOLS = ("prompt_logprobs", "echo", "next tokens", "chat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The tokenizer puts no token before a text."""
    folder = tmp_path_factory.mktemp("served")
    base = save_base(folder / "base")
    return Folders(base, save_adapter(base, folder / "a"), save_adapter(base, folder / "b", seed=5))


def in_eighths(folders: Folders) -> Logits:
    """What a base computes whose weights are rounded to 4 bits."""
    model = hf.AutoModelForCausalLM.from_pretrained(folders.base)
    for parameter in model.parameters():
        step = parameter.abs().max() / 8
        parameter.data = (parameter.data / step).round() * step
    model.save_pretrained(folders.base.parent / "four-bit")
    return with_peft(folders.base.parent / "four-bit", folders.adapter)


def with_changed(folders: Folders, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Logits:
    """What a server computes that has other tensors of the adapter."""
    changed = folders.adapter.parent / "changed"
    shutil.copytree(folders.adapter, changed, dirs_exist_ok=True)
    tensors = load_file(changed / "adapter_model.safetensors")
    save_file({name: change(name, value) for name, value in tensors.items()}, changed / "adapter_model.safetensors")
    return with_peft(folders.base, changed)


def with_cache_of_other(folders: Folders) -> Logits:
    """What a server computes that kept the keys and values of the first tokens from another adapter's request."""
    models = []
    for adapter in (folders.other, folders.adapter):
        model: Any = hf.AutoModelForCausalLM.from_pretrained(folders.base)
        model.load_adapter(str(adapter))
        models.append(model)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        cache = hf.DynamicCache()
        runs = zip(models, (ids[:, :2], ids[:, 2:]), strict=True)
        return torch.cat(
            [model(input_ids=part, past_key_values=cache, use_cache=True).logits[0] for model, part in runs]
        )

    return logits


def with_half_cache(folders: Folders, adapter: Path | None) -> Logits:
    """What a server computes that keeps keys and values in float16."""

    class Cache(hf.DynamicCache):  # type: ignore[misc]
        def update(self, keys: torch.Tensor, values: torch.Tensor, *more: Any, **options: Any) -> Any:
            return super().update(keys.half().float(), values.half().float(), *more, **options)

    model: Any = hf.AutoModelForCausalLM.from_pretrained(folders.base)
    if adapter is not None:
        model.load_adapter(str(adapter))
    return lambda ids: model(input_ids=ids, past_key_values=Cache(), use_cache=True).logits[0]


@pytest.mark.parametrize(
    ("begins", "protocol"),
    [
        *((True, protocol) for protocol in PROTOCOLS),
        *((False, protocol) if protocol == "echo" else slow(False, protocol) for protocol in PROTOCOLS),
    ],
)
def test_a_right_serving_is_the_same(protocol: str, begins: bool, folders: Folders, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", begins=begins)
    model = served(base, folders.adapter, protocol)
    result = verified(folders._replace(base=base), model, other=folders.other)
    assert result.verdict.same, str(result)
    facts = result.about["endpoint"]
    assert [other["name"] for other in result.about["others"]] == ["b"]
    assert (facts["model"], facts["listed"], facts["by"]) == ("a", {"id": "a", "parent": "base"}, protocol)
    assert len(model.requests) + model.unknown == facts["requests"] - 1 <= 200  # and the list of models
    assert {"input_ids"} == {sensitivity.input for sensitivity in result.verdict.sensitivity}
    if protocol == "echo":
        assert {tuple(map(type, [request["prompt"]])) for request in model.requests[1:]} == {(str,)}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "the adapter is not used": ({"adapter": None}, "the server answers as the base model: the adapter's name is acc"),
    "alpha is left out": (
        {"factor": 0.5},
        "0.5 times the correct strength (scale 2), as if the scale, 2, were left out",
    ),
    "another alpha": ({"factor": 1.37}, "the server answers as if its adapter has 1.37 times the correct strength"),
    "another tenant": ({"adapter": "other"}, "the server answers as the other tenant b (explains 100 %"),
    "one value wrong": (
        {"values": lambda values: [*values[:-1], values[-1] - 0.01]},
        "neither the base, nor another strength of the adapter, nor b",
    ),
    "a beginning is added": ({"prompt": lambda ids: [0, *ids], "counts": False}, "puts the token of a beginning (BOS)"),
    "a beginning is added and counted": ({"prompt": lambda ids: [0, *ids]}, "it adds tokens, such as that of a begin"),
    "tokens are dropped": ({"prompt": lambda ids: ids[1:]}, "it drops tokens"),
    "words are lower": ({"prompt": lambda ids: [max(2, one - 1) for one in ids], "counts": False}, ""),
    "a template": ({"prompt": lambda ids: [2, 3, *ids, 4]}, "the server counts"),
}


QUICK = {("the adapter is not used", protocol) for protocol in PROTOCOLS}  # beside all by the first protocol
QUICK |= {("a beginning is added", "chat"), ("tokens are dropped", "echo")}


@pytest.mark.parametrize(
    ("fault", "protocol"),
    [
        (fault, protocol) if protocol == PROTOCOLS[0] or (fault, protocol) in QUICK else slow(fault, protocol)
        for fault in FAULTS
        for protocol in PROTOCOLS
    ],
)
def test_a_wrong_serving_is_different(fault: str, protocol: str, folders: Folders) -> None:
    wrong, sentence = FAULTS[fault]
    if protocol == "prompt_logprobs" and wrong.get("counts") is False and sentence == "":
        sentence = "log-probabilities of other tokens than were sent"
    named = wrong.get("adapter", "adapter")
    adapter = None if named is None else getattr(folders, named)
    others = {name: value for name, value in wrong.items() if name != "adapter"}
    result = verified(folders, served(folders.base, adapter, protocol, **others), other=folders.other)
    assert result.verdict.outcome == "different" and result.exit_code == 4
    if not (protocol == "prompt_logprobs" and others.get("counts") is False):
        assert sentence in str(result), str(result)


HEAD = "lm_head.lora"
WRONG_MODELS: dict[str, Callable[[Folders], Logits]] = {
    "a quantised base": in_eighths,
    "a stale version": lambda folders: with_changed(folders, lambda name, value: value + 0.01 * value.std()),
    "a head is dropped": lambda folders: with_changed(folders, lambda name, value: value * (HEAD not in name)),
    "the cache of another adapter": with_cache_of_other,
}


@pytest.mark.parametrize(
    ("fault", "protocol"),
    [
        *((fault, "prompt_logprobs") for fault in WRONG_MODELS),
        *(slow(fault, "chat") for fault in ("a head is dropped", "the cache of another adapter")),
    ],
)
def test_a_wrong_model_is_different(fault: str, protocol: str, folders: Folders, tmp_path: Path) -> None:
    with_head = save_adapter(folders.base, tmp_path / "a", further=["lm_head"])
    folders = folders._replace(adapter=with_head)
    result = verified(folders, served(folders.base, None, protocol, logits=WRONG_MODELS[fault](folders)))
    assert result.verdict.outcome == "different", str(result)
    assert "quantised weights, and tokens that the server adds or drops" in str(result)


def test_another_chat_template_is_different(folders: Folders) -> None:
    """It makes as many tokens as that of the base."""
    model = served(folders.base, folders.adapter, "chat", prompt=lambda ids: [ids[0], 7, *ids[2:]])
    result = verified(folders, model)
    assert result.verdict.outcome == "different" and "neither the base" in str(result), str(result)


def test_chats_without_a_template_are_undecided(folders: Folders, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", template="")
    result = verified(folders._replace(base=base), served(base, folders.adapter, "chat"))
    assert result.exit_code == 5 and "Chats were not tried: the base's tokenizer has no chat template" in str(result)


TURNS = itertools.cycle((True, False))


@pytest.mark.parametrize(
    "wrong",
    [{"values": lambda values: values[:1]}, {"piece": lambda word: f"{word} " if next(TURNS) else None}],
    ids=["short", "every second token has no text"],
)
def test_replies_that_end_at_once_or_lack_texts_are_refused(
    wrong: dict[str, Any], folders: Folders, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", template=f"{TEMPLATE} ")
    folders = folders._replace(base=base)
    model = served(base, folders.adapter, "chat", **wrong)
    with pytest.raises(RuntimeRefused, match="its replies end at once, or have tokens that are no text"):
        verified(folders, model)


def test_a_chat_takes_no_inputs_of_the_user(folders: Folders, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", input_ids=np.arange(2, 42).reshape(2, 20))
    with pytest.raises(InputRefused, match="inputs=: the server takes messages alone"):
        verified(folders, served(folders.base, folders.adapter, "chat"), inputs=tmp_path / "own.npz")


def test_one_answer_to_all_prompts_is_from_a_cache(folders: Folders) -> None:
    kept: dict[int, Any] = {}

    def first_of_its_length(values: list[float]) -> list[float]:
        found: list[float] = kept.setdefault(len(values), values)
        return found

    result = verified(folders, served(folders.base, folders.adapter, values=first_of_its_length))
    assert result.verdict.outcome == "different" and "the same answer to different prompts" in str(result)


def test_an_echo_that_is_off_is_not_used(folders: Folders) -> None:
    result = verified(folders, served(folders.base, folders.adapter, "echo", shift=1))
    assert result.verdict.same and result.about["endpoint"]["by"] == "next tokens"
    notes = " ".join(result.verdict.notes)
    assert notes.count("the values of its `echo` are those of another position") == 1


def test_a_server_without_log_probabilities_is_undecided(folders: Folders) -> None:
    result = verified(folders, served(folders.base, folders.adapter, "none"))
    assert result.exit_code == 5 and "it ignores the field, as `transformers serve` does" in str(result)


@pytest.mark.parametrize(("decimals", "outcome"), [(4, "same"), (0, "undecided")])
def test_rounded_numbers_widen_the_limits(decimals: int, outcome: str, folders: Folders) -> None:
    rounded = served(folders.base, folders.adapter, values=lambda values: [round(value, decimals) for value in values])
    result = verified(folders, rounded)
    assert result.verdict.outcome == outcome
    assert f"the server gives its numbers with {decimals} decimals" in " ".join(result.verdict.notes)


def test_a_base_in_rounded_numbers_is_never_the_same(folders: Folders) -> None:
    rounded = served(folders.base, None, values=lambda values: [round(value, 2) for value in values])
    assert verified(folders, rounded).verdict.outcome == "different"


@pytest.mark.parametrize(("has_adapter", "outcome"), [(True, "same"), (False, "different")])
def test_a_cache_in_float16_is_measured(has_adapter: bool, outcome: str, folders: Folders) -> None:
    logits = with_half_cache(folders, folders.adapter if has_adapter else None)
    result = verified(folders, served(folders.base, None, logits=logits))
    assert result.verdict.outcome == outcome, str(result)
    expected = "keys and values rounded to float16" if has_adapter else "answers as the base model"
    assert expected in " ".join([*result.verdict.notes, str(result)])


@pytest.mark.parametrize(("adapter", "outcome"), [("adapter", "same"), ("other", "different"), (None, "different")])
def test_a_serving_in_bfloat16_is_judged_in_it(
    adapter: str | None, outcome: str, folders: Folders, tmp_path: Path
) -> None:
    folders = folders._replace(adapter=save_adapter(folders.base, tmp_path / "a", alpha=24))
    path = None if adapter is None else getattr(folders, adapter)
    model = served(folders.base, path, options={"dtype": torch.bfloat16})
    result = verified(folders, model, dtype="bfloat16", other=folders.other)
    assert result.verdict.outcome == outcome, str(result)
    assert {"adapter": "", "other": "answers as the other tenant b", None: "the base model"}[adapter] in str(result)


def test_own_inputs_are_compared_too(folders: Folders, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", input_ids=np.arange(2, 42).reshape(2, 20))
    model = served(folders.base, folders.adapter)
    result = verified(folders, model, inputs=tmp_path / "own.npz")
    assert result.verdict.same and "own.npz" in result.about["inputs"]
    assert list(range(2, 22)) in [request["prompt"] for request in model.requests]


def test_a_text_is_no_longer_than_the_server_takes(folders: Folders) -> None:
    models = [{"id": "a", "parent": "base", "max_model_len": None}, {"id": "base", "max_model_len": 20}]
    model = served(folders.base, folders.adapter, models=models)
    assert verified(folders, model).verdict.same
    assert max(len(request["prompt"]) for request in model.requests) == 19


def test_a_tenant_that_is_alike_leaves_it_undecided(folders: Folders) -> None:
    result = verified(folders, served(folders.base, folders.adapter), other=f"twin={folders.adapter}")
    assert result.verdict.outcome == "undecided" and "the other tenant twin gives the same values" in str(result)


def test_a_base_can_be_proven_without_an_adapter(folders: Folders) -> None:
    with serving(served(folders.base, None)) as address:
        result = le.verify(address, folders.base)
        assert result.verdict.same and result.about["endpoint"]["model"] == "base"
    with serving(served(folders.base, folders.adapter)) as address:
        assert le.verify(address, folders.base).verdict.outcome == "different"


@pytest.mark.parametrize(
    ("models", "served_name", "message"),
    [
        ([{"id": "x"}, {"id": "y"}], None, "lists x, y: say which model is judged, by served_name="),
        ([], None, "lists none: say which"),
        ([{"id": 1}, "odd", {"id": "one"}], None, ""),
        ([{"id": "x"}], "y", ""),
    ],
)
def test_the_model_that_is_meant(models: list[Any], served_name: str | None, message: str, folders: Folders) -> None:
    model = served(folders.base, folders.adapter, models=models)
    if message:
        with pytest.raises(InputRefused, match=message):
            verified(folders, model, served_name=served_name)
        return
    result = verified(folders, model, served_name=served_name)
    assert result.verdict.same
    assert {request["model"] for request in model.requests} == {served_name or "one"}
    assert ("does not list y among its models" in str(result)) is bool(served_name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "`choices` is no list of one object"),
        ({"choices": [1]}, "`choices` is no list of one object"),
        ({"choices": [{"prompt_logprobs": 5}]}, "`prompt_logprobs` is no list"),
        ({"choices": [{"prompt_logprobs": [None, 1, 1, 1]}]}, "an entry of `prompt_logprobs` is no object"),
    ],
)
def test_an_answer_of_wrong_types_is_refused(content: Any, message: str, folders: Folders) -> None:
    @dataclasses.dataclass(eq=False)
    class Wrong(Served):
        def answer(self, body: dict[str, Any]) -> dict[str, Any]:
            return dict(content)

    right = served(folders.base, folders.adapter)
    with pytest.raises(RuntimeRefused, match=f"JSON of another form: {message}"):
        verified(folders, Wrong(right.logits, right.tokenizer))


@pytest.mark.parametrize("value", [None, True, "-1.5", [], 1e300, 5, -1e9])
def test_a_value_that_is_no_log_probability_is_refused(value: Any, folders: Folders) -> None:
    model = served(folders.base, folders.adapter, values=lambda values: [value] * len(values))
    with pytest.raises(RuntimeRefused, match="a log-probability is"):
        verified(folders, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": True}, "trace=: an endpoint shows its answers alone"),
        ({"runner": "openvino"}, "runner=: an endpoint shows its answers alone"),
        ({"provider": "cuda"}, "is for .onnx files"),
        ({"adapter_id": 1}, "are for .onnx files"),
        ({"fixed": {"sequence": 4}}, "an endpoint shows its answers alone"),
        ({"adapters": (), "other": "b"}, "it is beside the adapter that is judged"),
        ({"model": None, "base": "base", "served_name": "a"}, "with base= nothing is run"),
    ],
)
def test_options_of_files_are_refused(options: dict[str, Any], message: str, folders: Folders) -> None:
    given = {"model": folders.base, "adapters": folders.adapter} | options
    with pytest.raises(WrongUsage, match=message):
        le.verify("https://host.invalid/v1", **given)


def test_options_of_endpoints_are_refused_beside_a_file(folders: Folders) -> None:
    with pytest.raises(WrongUsage, match="CANDIDATE is an address"):
        le.verify(folders.base, folders.base, served_name="a")


def test_the_command_and_its_reports(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_EXPORT_API_KEY", "sk-very-secret")
    reports = [tmp_path / f"v{suffix}" for suffix in (".json", ".xml", ".html", ".md", ".svg")]
    model = served(folders.base, None, busy=1)
    with serving(model) as address:
        written = (part for path in reports for part in ("--report", path))
        code, document = answer(
            capsys, "verify", f"{address}/", "--model", folders.base, "-a", folders.adapter, *written
        )
    assert code == 4 and document == json.loads(reports[0].read_text())
    assert document["about"]["candidate"] == {"path": address, "sha256": {}}
    assert document["about"]["endpoint"]["model"] == "a" and document["diagnosis"]["first"] is None
    assert "answers as the base model" in reports[1].read_text()
    assert {request["key"] for request in model.requests} == {"Bearer sk-very-secret"}
    assert not any("sk-very" in text for text in (json.dumps(document), *(path.read_text() for path in reports)))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(17))
def test_right_servings_raise_no_alarm(seed: int, protocol: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", seed=seed, begins=seed % 2 == 0)
    adapter = save_adapter(base, tmp_path / "a", seed=seed + 100, alpha=(1, 8, 20)[seed % 3], rank=(2, 4, 8)[seed % 3])
    model = served(base, adapter, protocol)
    result = verified(Folders(base, adapter, adapter), model, input_seed=seed)
    assert result.verdict.same, str(result)
    assert len(model.requests) <= 200
