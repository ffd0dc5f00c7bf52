"""`lora_export.verify`: a verdict as a value, whichever it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_export as le
from lora_export.errors import InputRefused, OutputFailed, WrongUsage
from support.api import MODEL
from support.handmade import peft_adapter


def test_a_right_graph_is_the_same(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "adapter", reports=[tmp_path / "v.json"])
    assert result and result.verdict.same and result.error is None
    assert str(result).startswith("same")
    assert result.about["candidate"]["path"] == str(place / "m.onnx") and result.seconds > 0
    document = json.loads((tmp_path / "v.json").read_text())
    assert document == json.loads(json.dumps(result.as_document()))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give model="),
        ({"base": "b", "input_seed": 1}, "^input_seed=: with base= nothing is run"),
        ({"base": "b", "input_seed": 0}, "with base= nothing is run"),
        ({"base": "b", "trace": True, "atol": 1.0}, "^atol= and trace=: with base= nothing is run"),
        ({"base": "b"}, "base= alone judges checkpoints"),
        ({"model": MODEL, "base": "b.safetensors"}, r"base= beside model= is .* made from\. Leave base= out$"),
    ],
)
def test_options_that_do_not_go_together_are_refused(place: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        le.verify(place / "m.onnx", **options)  # type: ignore[arg-type]


def test_model_and_base_of_a_checkpoint_are_two_questions(place: Path) -> None:
    with pytest.raises(WrongUsage, match=r"base= beside model= is .* Give one of the two: model="):
        le.verify(place / "merged.safetensors", MODEL, base=place / "base.safetensors")


def test_an_own_runner_may_run_an_adapter(place: Path) -> None:
    with pytest.raises(InputRefused, match="no_such_module"):
        le.verify(place / "adapter", MODEL, adapters=place / "adapter", runner="no_such_module:opened")


def test_a_report_of_an_unknown_kind_is_refused_first(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"\.json"):
        le.verify(place / "m.onnx", MODEL, reports=[tmp_path / "verdict.txt"])


@pytest.mark.parametrize("name", ["m.onnx", "merged.safetensors"])
def test_candidate_that_changes_while_it_is_judged_is_refused(place: Path, tmp_path: Path, name: str) -> None:
    """A wrong file takes the place of the right one before its hash is taken."""
    candidate = tmp_path / name
    candidate.write_bytes((place / name).read_bytes())

    def swap(event: le.Progress) -> None:
        if (
            event.stage in ("hashing the candidate", "judging")
            and candidate.read_bytes() == (place / name).read_bytes()
        ):
            other = tmp_path / "other"
            other.write_bytes(bytes(candidate.stat().st_size))
            other.replace(candidate)

    base = {"model": MODEL} if name == "m.onnx" else {"base": place / "base.safetensors"}
    with pytest.raises(InputRefused, match=f"{name} changed while it was judged, so nothing is decided"):
        le.verify(candidate, **base, adapters=place / "adapter", on_progress=swap)


def test_a_missing_adapter_file_is_named_at_once(tmp_path: Path) -> None:
    stages: list[str] = []
    (tmp_path / "m.pte").write_bytes(b"a program")
    with pytest.raises(InputRefused, match=r"there is no adapter file at .*nothere\.safetensors"):
        le.verify(
            tmp_path / "m.pte",
            MODEL,
            onnx_adapter=tmp_path / "nothere.safetensors",
            on_progress=lambda event: stages.append(event.stage),
        )
    assert "loading the model" not in stages


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, an adapter, and the folder that a merge makes of both."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained(place / "base")
    rng = np.random.default_rng(0)
    pair = (rng.standard_normal((2, 16)), rng.standard_normal((16, 2)))
    peft_adapter(place / "adapter", {"encoder.layer.0.attention.self.query": pair})
    le.merge(place / "base", place / "adapter", place / "merged")
    return place


@pytest.mark.parametrize("against", ["base", "model"])
def test_the_current_folder_is_judged(folders: Path, monkeypatch: pytest.MonkeyPatch, against: str) -> None:
    monkeypatch.chdir(folders / "merged")
    assert le.verify(".", **{against: "../base"}, adapters="../adapter")


@pytest.mark.parametrize("against", ["base", "model"])
def test_config_that_another_changed_is_different_and_named(folders: Path, tmp_path: Path, against: str) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(folders / "merged", merged)
    given = {"base": folders / "base"} if against == "base" else {"model": str(folders / "base")}
    reports = [tmp_path / f"v.{suffix}" for suffix in ("json", "xml", "html")]
    assert le.verify(merged, **given, adapters=folders / "adapter", reports=reports), "a right merge is the same"
    config = json.loads((merged / "config.json").read_text())
    # No weight shows it, and within the tolerances no output: the norms divide by about 1.
    (merged / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))
    result = le.verify(merged, **given, adapters=folders / "adapter", reports=reports)
    sentence = "config.json: pad_token_id is 7, the base has 0"
    assert result.exit_code == 4 and sentence in str(result)
    assert all(sentence in path.read_text() for path in reports)


@pytest.mark.parametrize("against", ["base", "model"])
def test_second_set_of_weights_is_different_and_the_judged_files_are_listed(
    folders: Path, tmp_path: Path, against: str
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(folders / "merged", merged)
    (merged / "training_args.bin").write_bytes(b"")
    given = {"base": folders / "base"} if against == "base" else {"model": str(folders / "base")}
    right = le.verify(merged, **given, adapters=folders / "adapter")
    about = right.as_document()["about"]
    judged = about["judged_files"] if against == "base" else about["candidate"]["sha256"]
    assert right and sorted(judged) == ["config.json", "model.safetensors"]
    (merged / "pytorch_model.bin").write_bytes(b"PK")
    wrong = le.verify(merged, **given, adapters=folders / "adapter")
    assert wrong.exit_code == 4 and "pytorch_model.bin is not what was judged" in str(wrong)


def test_report_never_overwrites_an_input(folders: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(folders / "merged", merged)
    given = {"base": folders / "base", "adapters": folders / "adapter"}
    for name in ("config.json", "lora_export.json"):
        before = (merged / name).read_bytes()
        with pytest.raises(InputRefused, match=rf"{name} is an input, or a file of .*merged"):
            le.verify(merged, **given, reports=[merged / name])
        assert (merged / name).read_bytes() == before
    for _ in range(2):  # the report of the run before may be replaced
        assert le.verify(merged, **given, reports=[merged / "verdict.json"])


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("lora_export.api.verify.judge_weights", lambda *_: pytest.fail("it was judged"))
    given = {"base": folders / "base", "adapters": folders / "adapter"}
    for name in ("folder.json", "file/a.json"):
        with pytest.raises(OutputFailed):
            le.verify(folders / "merged", **given, reports=[tmp_path / "new/a.json", tmp_path / name])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.json"]
