"""What training writes: cards, metrics, and the table of a comparison."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

import lora_export as le
from lora_export.api.training_output import noted_checkpoint, staged_output
from lora_export.errors import InputRefused, OutputFailed
from lora_export.storage import atomic_output
from support.api import MODEL, Recorder


@pytest.mark.slow
def test_ranks_and_strategies_are_compared_in_a_table(data: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "batch_size": 8, "compare": ["full", "frozen"]}
    result = le.train(MODEL, data, tmp_path / "out", rank=[2, 4], **options)
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {"comparison.json", "comparison.png", "comparison.html", "rank-2/README.md"} <= written
    table = json.loads((tmp_path / "out/comparison.json").read_text())["runs"]
    assert [(run["strategy"], run["rank"], run["trained_parameters"]) for run in table] == [
        ("lora", 2, 32), ("lora", 4, 64), ("full", None, table[0]["all_parameters"] - 32), ("frozen", None, 0),
    ]  # fmt: skip
    assert table[0]["losses"][0] == table[1]["losses"][0] == pytest.approx(table[2]["losses"][0])
    assert table[0]["memory"]["optimizer"] < table[1]["memory"]["optimizer"] < table[2]["memory"]["optimizer"]
    alone = le.train(MODEL, data, tmp_path / "alone", rank=4, epochs=2, batch_size=8)
    assert alone.adapter.sha256 == result.adapters[1].sha256  # nothing of the first training is left
    assert result.scores["full"].loss != result.scores["frozen"].loss


def test_the_card_and_the_metrics_tell_what_was_trained(data: Path, tmp_path: Path) -> None:
    result = le.train(MODEL, data, tmp_path / "ad", rank=2, epochs=2, evaluate_every=2, batch_size=8)
    card = (tmp_path / "ad/README.md").read_text()
    for text in ("library_name: peft", "SHA-256 of the data", hashlib.sha256(data.read_bytes()).hexdigest()):
        assert text in card
    lines = [json.loads(line) for line in (tmp_path / "ad/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == list(result.history.losses)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 4, 6]
    assert Image.open(tmp_path / "ad/losses.png").format == "PNG" and "(losses.png)" in card


def test_without_matplotlib_no_plot_is_promised(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    seen = Recorder()
    le.train(MODEL, data, tmp_path / "ad", rank=2, epochs=1, **seen.callbacks)
    assert not (tmp_path / "ad/losses.png").exists() and "![" not in (tmp_path / "ad/README.md").read_text()
    assert [line for line in seen.messages if "the losses are not drawn: matplotlib is missing" in line]


@pytest.mark.parametrize(("missing", "files"), [("matplotlib", {".json", ".html"}), ("jinja2", {".json", ".png"})])
def test_a_comparison_is_written_as_far_as_packages_allow(
    missing: str, files: set[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    seen = Recorder()
    le.train(MODEL, data, tmp_path / "out", rank=[2, 4], epochs=1, **seen.callbacks)
    assert {path.suffix for path in tmp_path.glob("out/comparison.*")} == files
    assert "<img" not in (tmp_path / "out/comparison.html").read_text() if missing == "matplotlib" else True
    assert any(f": {missing} is missing (pip install '" in line for line in seen.messages)


# --- TensorBoard ---


class FakeTracker:
    """accelerate's tracker, without TensorBoard."""

    made: ClassVar[list[FakeTracker]] = []

    def __init__(self, run_name: str, logging_dir: str, **options: Any) -> None:
        self.folder, self.options, self.logged, self.state = Path(logging_dir, run_name), options, [], "new"
        self.made.append(self)

    def start(self) -> None:
        self.state = "started"

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.state = "finished"


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTracker]:
    monkeypatch.setattr(FakeTracker, "made", [])
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", FakeTracker)
    monkeypatch.setattr("lora_export.api.train.require_tensorboard", lambda: None)
    return FakeTracker.made


@pytest.mark.slow
def test_every_run_is_logged_while_it_trains(data: Path, tmp_path: Path, trackers: list[FakeTracker]) -> None:
    options = {"epochs": 2, "batch_size": 8, "evaluate_every": 2, "compare": ["full"], "tensorboard": tmp_path / "log"}
    result = le.train(MODEL, data, tmp_path / "out", rank=[2, 4], **options)
    assert [one.folder for one in trackers] == [tmp_path / "log" / name for name in ("rank-2", "rank-4", "full")]
    for tracker, run in zip(trackers, result.runs, strict=True):
        assert (tracker.state, tracker.options) == ("finished", {"purge_step": 1})
        assert [values["loss"] for _, values in tracker.logged if "loss" in values] == list(run.history.losses)
        evaluations = [(step, values["held_out_loss"]) for step, values in tracker.logged if "loss" not in values]
        assert evaluations == [(one.step, one.held_out_loss) for one in run.history.evaluations]
        assert not any("step" in values or None in values.values() for _, values in tracker.logged)


def test_a_resumed_log_replaces_the_steps_after_the_checkpoint(
    data: Path, tmp_path: Path, trackers: list[FakeTracker]
) -> None:
    def interrupt(event: Any) -> None:
        if event.done == 5:
            raise KeyboardInterrupt

    options = {"rank": 2, "epochs": 3, "batch_size": 8, "tensorboard": tmp_path / "log"}
    with pytest.raises(KeyboardInterrupt):
        le.train(MODEL, data, tmp_path / "ad", **options, on_progress=interrupt)
    le.train(MODEL, data, tmp_path / "ad", **options, resume=True)
    assert [one.options["purge_step"] for one in trackers] == [1, 5]
    assert [one.state for one in trackers] == ["finished", "finished"]


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_failed_output_names_the_checkpoint_where_there_is_one(has_checkpoint: bool, tmp_path: Path) -> None:
    if has_checkpoint:
        (tmp_path / "ad.training").mkdir()
        (tmp_path / "ad.training/state.safetensors").touch()
    with pytest.raises(OutputFailed) as failed, staged_output(tmp_path / "ad", [], overwrite=False, on_message=print):
        raise OSError(errno.ENOSPC, "No space left on device")
    lines = str(failed.value).splitlines()
    assert lines[0].endswith("ad could not be written: No space left on device")
    checkpoint = f"The last checkpoint is in {tmp_path}/ad.training: resume=True continues from it."
    assert lines[1:] == ([checkpoint] if has_checkpoint else [])
    assert not (tmp_path / "ad").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputRefused])
def test_a_checkpoint_that_is_left_counts_as_written(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_output, "published", published := [])
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(error), noted_checkpoint(folder):
            raise error
    assert published == [tmp_path]
