"""Models that a function of the user returns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_export.errors import InputRefused
from lora_export.models.load import load_model
from support import FACTORIES

HERE = FACTORIES.parent


def test_a_factory_in_a_file_gives_its_module_in_eval_mode() -> None:
    loaded = load_model(f"{FACTORIES}:spotter")
    assert type(loaded.module).__name__ == "Spotter"
    assert not loaded.module.training
    assert loaded.input_names == ("signal",)


def test_a_factory_in_a_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    assert load_model("factories:scaled").input_names == ("rows", "weights")


def test_a_package_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    (tmp_path / "a_net_of_mine.py").write_text(
        f"import sys; sys.path.append({str(HERE)!r}); from factories import scaled"
    )
    with pytest.raises(InputRefused, match="cannot import a_net_of_mine"):
        load_model("a_net_of_mine:scaled")
    monkeypatch.chdir(tmp_path)
    assert load_model("a_net_of_mine:scaled").input_names == ("rows", "weights")


def test_varying_axes_are_found_by_running_the_model() -> None:
    # The 4 channels belong to the convolution; the length does not.
    assert load_model(f"{FACTORIES}:spotter").axes == {"signal": {0: "batch", 2: "signal_axis2"}}


def test_axes_of_one_size_vary_together() -> None:
    assert load_model(f"{FACTORIES}:scaled").axes == {
        "rows": {0: "batch", 1: "rows_axis1"},
        "weights": {0: "batch", 1: "rows_axis1"},
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("no_such_package_at_all:make", "cannot import no_such_package_at_all"),
        (f"{FACTORIES}:missing", "has no function missing; it has .*spotter"),
        (f"{FACTORIES}:without_examples", "without example inputs"),
        (f"{FACTORIES}:single_row", "at least 2"),
        (f"{FACTORIES}:no_rows", r"example inputs have no numbers: signal \[0, 4, 9\]"),
        (f"{FACTORIES}:no_module", "returned str"),
        (f"{FACTORIES}:failing", r"factories\.py:\d+: ValueError: no weights at hand"),
        (f"{FACTORIES}:quitting", r"factories\.py:\d+: SystemExit: 0"),
        (f"{FACTORIES}:wrong_examples", r"do not fit forward\(signal\)"),
        (
            f"{FACTORIES}:uncopied",
            r"cannot be copied, which .* \(its attribute 0.lock: cannot pickle '_thread.lock' object\)",
        ),
        (
            f"{FACTORIES}:fixed_batch",
            r"fails at another batch size, 3: .* \(factories\.py, line \d+, in forward: `return x",
        ),
    ],
)
def test_a_wrong_factory_is_refused_with_its_fault(source: str, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        load_model(source)


def test_a_syntax_error_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make(:\n")
    with pytest.raises(InputRefused, match=r"broken\.py.*SyntaxError"):
        load_model(f"{tmp_path / 'broken.py'}:make")
