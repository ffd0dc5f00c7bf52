"""`lora_export.check`, with and without a base, and as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_export
from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.adapters import RUNTIMES
from support import cli
from support.gguf_files import llama, write_llama
from support.peft_models import trained
from support.preflight_adapters import CASES, Case

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name in ("plain", "dora", "rank 32", "other prefix"):
        CASES[name].write(folder / name.replace(" ", "-"))
    llama().save_pretrained(folder / "base")
    return folder


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command; return its exit code and what it printed."""

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.call(*words)
        return code, *capsys.readouterr()

    return run


def test_an_adapter_that_fits(place: Path, call: Call) -> None:
    found = lora_export.check("plain", runtimes=["vllm", "sglang"], base="base")
    assert found and [outcome.runtime for outcome in found.outcomes] == ["vllm", "sglang"]
    code, out, _ = call("check", "plain", "--for", "vllm", "--base", "base")
    assert code == 0 and "vLLM 0.32.0: fits" in out


def test_a_finding_has_its_source_and_its_repair(place: Path, call: Call) -> None:
    code, out, err = call("check", "dora", "--for", "vllm", "--base", "base")
    assert code == 3 and "dora is not run as it was trained by vLLM" in err
    assert "refused: It has no DoRA: 'vLLM does not yet support DoRA.'" in out
    assert "vllm-project/vllm 0.32.0, vllm/lora/peft_helper.py" in out
    assert "-> lora-export merge base dora -o OUT" in out
    assert call("check", "dora", "--for", "vllm", "-q")[1].count("\n") == 1


def test_a_failure_is_one_document(place: Path, call: Call) -> None:
    code, out, _ = call("check", "dora", "--for", "vllm", "--for", "mlx", "--json")
    found = json.loads(out)
    assert code == 3 and not found["fits"]
    vllm, mlx = found["outcomes"]
    (finding,) = vllm["findings"]
    assert finding["effect"] == "refused" and finding["repair"]["command"] == "merge" and finding["changes"]
    assert [one["repair"]["name"] for one in mlx["findings"]] == ["mlx"]


def test_what_the_server_is_started_with_counts(place: Path, call: Call) -> None:
    assert call("check", "rank-32", "--for", "vllm")[0] == 3
    assert call("check", "rank-32", "--for", "vllm", "--with", "max-lora-rank=32")[0] == 0
    with pytest.raises(WrongUsage, match="settings= has ranks; these runtimes have max-lora-rank"):
        lora_export.check("plain", runtimes=["vllm"], settings={"ranks": 1})


def test_without_the_base_the_names_are_not_checked(place: Path, call: Call) -> None:
    found = lora_export.check("other-prefix", runtimes=["vllm"])
    assert found and found.outcomes[0].unknown == ("in_base",)
    code, out, _ = call("check", "other-prefix", "--for", "vllm")
    assert code == 0 and "not checked: whether the base has a tensor of this name" in out
    assert not lora_export.check("other-prefix", runtimes=["vllm"], base="base")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"runtimes": []}, WrongUsage, "has to name a runtime: comfyui, diffusers"),
        ({"runtimes": ["tgi"]}, WrongUsage, "is 'tgi'; it must be comfyui"),
        ({"runtimes": ["vllm"], "settings": {"max-lora-rank": float("nan")}}, WrongUsage, "max-lora-rank has to be"),
        ({"runtimes": ["vllm"], "base": "nowhere"}, InputRefused, "nowhere"),
    ],
)
def test_what_is_refused(given: Any, error: type[Exception], message: str, place: Path) -> None:
    with pytest.raises(error, match=message):
        lora_export.check("plain", **given)


def test_an_adapter_of_another_base_is_refused(place: Path) -> None:
    sizes = llama().config.to_dict() | {"hidden_size": 128}
    other = LlamaForCausalLM(LlamaConfig(**sizes))
    other.save_pretrained(place / "other")
    with pytest.raises(InputRefused, match=r"targets do not fit the base\.\n"):
        lora_export.check("plain", runtimes=["vllm"], base="other")


@pytest.mark.parametrize(
    ("fields", "unties"),
    [
        ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"use_dora": True}, False),
    ],
)
def test_what_one_table_cannot_hold_is_repaired_by_a_merge_that_unties(
    fields: dict[str, Any], unties: bool, tmp_path: Path
) -> None:
    Case(fields, tied=True).write(tmp_path / "a")
    llama(tied=True).save_pretrained(tmp_path / "base")
    (outcome,) = lora_export.check(tmp_path / "a", runtimes=["vllm"], base=tmp_path / "base").outcomes
    (repair,) = outcome.repairs
    assert repair.command == "merge" and (repair.options.get("tied") == "untie") is unties


def test_a_merge_that_is_refused_is_no_repair(tmp_path: Path) -> None:
    """Rows of a table are those of the tied head, too, which has a pair; the base stores both."""
    fields = {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}}
    Case(fields, tied=True).write(tmp_path / "a")
    llama(tied=True).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    for stored in ({}, {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}):
        save_file(weights | stored, file, {"format": "pt"})
        with pytest.raises(InputRefused, match="and adds to it: no merge does both"):
            lora_export.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", tied="untie")
        with pytest.raises(InputRefused, match="and adds to it: no merge does both"):
            lora_export.check(tmp_path / "a", runtimes=["vllm"], base=tmp_path / "base")


@pytest.mark.parametrize("is_apart", [False, True])
def test_rows_of_one_of_two_tables_need_a_merge_that_unties(is_apart: bool, tmp_path: Path) -> None:
    """Where the base stores the head with other values, PEFT has its rows in the embeddings alone."""
    Case({"trainable_token_indices": {"embed_tokens": [1, 2]}}, tied=True).write(tmp_path / "a")
    llama(tied=True).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + is_apart}, file, {"format": "pt"})
    (outcome,) = lora_export.check(tmp_path / "a", runtimes=["vllm"], base=tmp_path / "base").outcomes
    (repair,) = outcome.repairs
    assert repair.command == "merge" and (repair.options.get("tied") == "untie") is is_apart
    with pytest.raises(InputRefused, match="other values") if is_apart else nullcontext():
        lora_export.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    lora_export.merge(tmp_path / "base", tmp_path / "a", tmp_path / "untied", tied="untie")


def test_a_type_of_model_without_gguf_adapters_is_repaired_by_a_merge(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    trained(model, r=2, target_modules=["c_attn"]).save_pretrained(tmp_path / "a")
    found = lora_export.check(tmp_path / "a", runtimes=["ollama", "llama.cpp"], base=tmp_path / "base")
    assert [[repair.name for repair in outcome.repairs] for outcome in found.outcomes] == [["merge"], ["merge"]]


@pytest.mark.parametrize("case", [CASES["tied head"], Case({"modules_to_save": ["lm_head"]}, tied=True)])
def test_a_gguf_base_gets_no_head_of_its_own(case: Case, tmp_path: Path) -> None:
    """The model of which it was made does."""
    case.write(tmp_path / "a")
    base = write_llama(tmp_path / "base.gguf", model=llama(tied=True))
    for outcome in lora_export.check(tmp_path / "a", runtimes=["ollama", "llama.cpp"], base=base).outcomes:
        (repair,) = outcome.repairs
        assert repair.arguments == ("CHECKPOINT", str(tmp_path / "a")) and repair.options["tied"] == "untie"
        assert repair.text.endswith("# CHECKPOINT: the model of which base.gguf was made")


def test_all_runtimes_are_choices_of_the_option(call: Call) -> None:
    assert call("check", "x", "--for", "nothing")[0] == 2
    _, out, _ = call("check", "--help")
    assert f"[{'|'.join(RUNTIMES)}]" in out.replace("\n", "").replace(" ", "")
