"""Messages name options as the door spells them."""

from __future__ import annotations

import pytest

from lora_export.options.adapters import ConvertOptions
from lora_export.options.commands import declared_flags
from lora_export.options.export import OnnxOptions
from lora_export.options.fleet import entries_of
from lora_export.options.merge import MergeOptions
from lora_export.options.spelling import as_command_line, command, named
from lora_export.options.verify import VerifyOptions

SPELLINGS = [
    (lambda: named("dtype"), "dtype=", "--dtype"),
    (lambda: named("dtype", "float32"), 'dtype="float32"', "--dtype float32"),
    (lambda: named("max_length"), "max_length=", "--max-length"),
    (lambda: named("rtol", 0), "rtol=0", "--rtol 0"),
    (lambda: named("verify", False), "verify=False", "--no-verify"),
    (lambda: named("strict", False), "strict=False", "--no-strict"),
    (lambda: named("requantize", True), "requantize=True", "--requantize"),
    (lambda: named("per_row", 2), "per_row=2", "--adapters-per-row 2"),
    (lambda: named("weights"), "weights=", "--weight"),
    (lambda: named("expect_base_sha256"), "base_sha256=", "--expect-base-sha256"),
    (lambda: named("columns", {"a": "b", "c": "d"}), 'columns={"a": "b", "c": "d"}', "--column a=b --column c=d"),
    (lambda: named("hashing", "sha256"), 'hashing="sha256"', "--hash sha256"),
    (
        lambda: command("onnx", "GRAPH", lora="nodes"),
        'export_onnx("GRAPH", lora="nodes")',
        "lora-export onnx GRAPH --lora nodes",
    ),
    (lambda: named("layout", {"NAME": "in_out"}), 'layout={"NAME": "in_out"}', "--layout NAME=in_out"),
    (lambda: named("enable_lora", {"q": (True, False)}), 'enable_lora={"q": (True, False)}', "--enable-lora q=1,0"),
    (
        lambda: command("merge", "BASE", "ADAPTER", output="OUT", only_head=True),
        'merge("BASE", "ADAPTER", output="OUT", only_head=True)',
        "lora-export merge BASE ADAPTER -o OUT --only-head",
    ),
    (lambda: command("merge", requantize=True), "merge(requantize=True)", "lora-export merge --requantize"),
    (
        lambda: command("doctor", provider="cuda"),
        "lora-export doctor --provider cuda",
        "lora-export doctor --provider cuda",
    ),
]


@pytest.mark.parametrize(("text", "in_python", "on_the_command_line"), SPELLINGS)
def test_each_door_spells_an_option_its_own_way(text, in_python, on_the_command_line):
    assert text() == in_python
    with as_command_line(declared_flags):
        assert text() == on_the_command_line


ENTRIES = [
    (MergeOptions, lambda: named("dtype"), "`dtype`"),
    (MergeOptions, lambda: named("dtype", "float32"), '`dtype = "float32"`'),
    (MergeOptions, lambda: named("overwrite"), "`overwrite = true`"),
    (MergeOptions, lambda: named("min_retention", 0), "`min-retention = 0`"),
    (MergeOptions, lambda: named("weights", 0.5), "`weight = 0.5`"),
    (MergeOptions, lambda: named("combine", "dare"), '`combine = "dare"`'),
    (MergeOptions, lambda: named("layout", {"a.NAME": "in_out"}), '`layout = {"a.NAME" = "in_out"}`'),
    (MergeOptions, lambda: named("enable_lora", {"q": (True, False)}), '`enable-lora = {"q" = "1,0"}`'),
    (OnnxOptions, lambda: named("output"), "`output`"),
    (OnnxOptions, lambda: named("verify", False), "`no-verify = true`"),
    (OnnxOptions, lambda: named("verify"), "`no-verify`"),
    (VerifyOptions, lambda: named("strict", False), "`strict = false`"),
    (VerifyOptions, lambda: named("expect_rank"), "`expect-rank`"),
    (ConvertOptions, lambda: named("merge_only"), "merge_only="),
    (MergeOptions, lambda: command("onnx", "GRAPH", lora="nodes"), 'export_onnx("GRAPH", lora="nodes")'),
]


@pytest.mark.parametrize(("record", "text", "entry"), ENTRIES)
def test_a_file_names_its_options_as_it_has_them(record, text, entry):
    with entries_of(record):
        assert text() == entry


def test_the_spelling_of_python_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError), as_command_line(declared_flags):
        _ = 1 / 0
    assert named("dtype") == "dtype="
