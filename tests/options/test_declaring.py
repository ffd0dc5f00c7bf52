"""Records of options: what is declared once, and everything that follows from it."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import MISSING
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_export.api.verify_record import VerifyRequest
from lora_export.callbacks import ignore
from lora_export.errors import WrongUsage
from lora_export.options.adapters import CheckOptions, ExtractOptions, ResizeOptions
from lora_export.options.combining import Combination, Weighted
from lora_export.options.commands import RECORDS, declared_flags
from lora_export.options.declaring import (
    Declared,
    Only,
    documentation,
    extended,
    narrowed,
    nested_in,
    options_of,
    takes,
)
from lora_export.options.export import GenerateOptions, OnnxOptions, TorchScriptOptions
from lora_export.options.merge import MergeOptions
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import as_command_line
from lora_export.options.train import TrainingSettings, TrainOptions
from lora_export.options.verify import Judging, VerifyOptions


def declared(record, name):
    (one,) = (one for one in options_of(record) if one.name == name)
    return one


@pytest.mark.parametrize(
    ("record", "name", "kind", "choices", "multiple", "flags"),
    [
        (MergeOptions, "base", "path", (), False, ("--base",)),
        (MergeOptions, "adapters", "source", (), True, ("--adapters",)),
        (MergeOptions, "dtype", "choice", ("keep", "float32", "bfloat16", "float16"), False, ("--dtype",)),
        (MergeOptions, "min_retention", "float", (), False, ("--min-retention",)),
        (MergeOptions, "hashing", "choice", ("xxh3_128", "sha256"), False, ("--hash",)),
        (MergeOptions, "weights", "float", (), True, ("--weight",)),
        (MergeOptions, "dry_run", "flag", (), False, ("--dry-run",)),
        (TorchScriptOptions, "verify", "flag", (), False, ("--no-verify",)),
        (OnnxOptions, "fuse", "choice", ("cpu", "cuda", "webgpu"), False, ("--fuse",)),
        (OnnxOptions, "target", "text", (), False, ("--target",)),
        (TrainOptions, "rank", "int", (), True, ("--rank",)),
        (TrainOptions, "compare", "choice", ("full", "frozen"), True, ("--compare",)),
        (VerifyOptions, "fixed", "text", (), True, ("--fixed",)),
        (VerifyOptions, "reports", "path", (), True, ("--report",)),
    ],
)
def test_type_and_default_of_a_field_tell_what_an_option_takes(record, name, kind, choices, multiple, flags):
    one = declared(record, name)
    assert (one.kind, one.choices, one.multiple, one.flags) == (kind, choices, multiple, flags)


def test_arguments_come_first_then_the_own_options_of_a_record():
    names = [one.name for one in options_of(MergeOptions)]
    assert names[:2] == ["base", "adapters"] and names.index("dtype") < names.index("weights") < names.index("download")
    assert set(nested_in(MergeOptions)) == {"combination", "reading"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "float8"}, "dtype= is 'float8'; it must be keep, float32, bfloat16 or float16"),
        ({"min_retention": 1.5}, "min_retention= is 1.5; it must be at least 0 and at most 1"),
        ({"min_retention": float("nan")}, "min_retention= is nan"),
        ({"weights": [10**400]}, "weights= has more than 308 digits"),
        ({"tied": "maybe"}, "tied= is 'maybe'; it must be error, untie or both"),
        ({"combination": "mean"}, "method= is 'mean'; it must be cat, linear"),
        ({"combination": {"method": "svd"}}, "combination= is {'method': 'svd'}; it must be a Combination"),
        ({"dtype": ["float16"]}, r"dtype= is \['float16'\]; it must be keep, float32, bfloat16 or float16"),
        ({"min_retention": "0.5"}, "min_retention= is '0.5'; it must be a number"),
        ({"weights": "12"}, "weights= is '12'; it must be a number"),
        ({"weights": [None]}, "weights= is None; it must be a number"),
        ({"weights": {"fr": 0.5}}, "weights= is {'fr': 0.5}; it must be a list"),
        ({"jobs": 2.0}, "jobs= is 2.0; it must be a whole number"),
        ({"overwrite": "no"}, "overwrite= is 'no'; it must be True or False"),
        ({"layout": "in_out"}, r"layout= is 'in_out'; it must be a dict of NAME=in_out\|out_in"),
        ({"layout": {"fc": "conv"}}, "layout=: fc=conv is not NAME=out_in or NAME=in_out"),
        ({"dtype_of": {"fc": "Q9"}}, "dtype_of=: fc=Q9 is not NAME=TYPE with a type of Q8_0"),
        ({"prefixes": {3: "a"}}, "prefixes= is {3: 'a'}; it must be a dict of FROM=TO"),
        ({"reading": {"format": "peft"}}, "reading= is {'format': 'peft'}; it must be a ReadOptions"),
        ({"on_message": "print"}, "on_message= is 'print'; it must be a function, or left out"),
        ({"dtype": np.array([1, 2])}, r"dtype= is array\(\[1, 2\]\); it must be keep, float32"),
        ({"overwrite": np.array([1, 0])}, r"overwrite= is array\(\[1, 0\]\); it must be True or False"),
        ({"base": b"base"}, "base= is b'base'; it must be a path"),
        ({"base": None}, "base= is None; it must be a path"),
        ({"base": Declared}, r"base= is a value of the type type; it must be a path"),
        ({"adapters": {"fr": "fr"}}, "adapters= is {'fr': 'fr'}; it must be a list"),
        ({"adapters": 3}, "adapters= is 3; it must be a path, or what is loaded already"),
        ({"adapters": [["a", "b"]]}, r"adapters= is \['a', 'b'\]; it must be a path, or what is loaded already"),
    ],
)
def test_a_record_refuses_values_that_do_not_exist(wrong, message):
    with pytest.raises(WrongUsage, match=message):
        MergeOptions(**{"base": "base", "adapters": ["a"], "output": "out"} | wrong)


def test_flags_of_a_table_are_flags():
    with pytest.raises(WrongUsage, match=r"enable_lora= is {'fc': \[True, None\]}; it must be a dict of NAME=1,0,1"):
        ReadOptions(enable_lora={"fc": [True, None]})


@pytest.mark.parametrize("seed", [-(2**63), 2**63])
def test_a_seed_beyond_those_of_pytorch_is_refused(seed):
    torch.manual_seed(2**63 - 1)
    with pytest.raises(WrongUsage, match=r"input_seed= is -?9\.22337e\+18; it must be at least"):
        Judging(input_seed=seed)
    with pytest.raises(WrongUsage, match=r"seed= is -?9\.22337e\+18; it must be at least 0"):
        TrainOptions("base", data="data", output="out", seed=seed)


def test_a_compiled_pattern_is_no_text():
    with pytest.raises(WrongUsage, match=r"exclude= is re.compile\('x'\); it must be a text"):
        ExtractOptions("base", "tuned", "out", rank=2, exclude=[re.compile("x")])


LEFT_OUT = {"overwrite": False, "dtype": "float32", "adapters": (), "on_message": ignore}


@pytest.mark.parametrize(
    ("record", "given", "taken"),
    [
        (ResizeOptions, {"rank": np.int64(2), "energy": np.float32(0.5)}, {"rank": 2, "energy": 0.5}),
        (ResizeOptions, {"rank": torch.tensor(2), "energy": Fraction(1, 2)}, {"rank": 2, "energy": 0.5}),
        (Weighted, {"weights": np.array([0.5, 2])}, {"weights": (0.5, 2.0)}),
        (Weighted, {"weights": (each for each in (0.5, 2))}, {"weights": (0.5, 2)}),
        (Weighted, {"weights": 0.5}, {"weights": (0.5,)}),
        (ExtractOptions, {"exclude": "*.bias"}, {"exclude": ("*.bias",)}),
        (CheckOptions, {"runtimes": "vllm", "settings": {"a": "64"}}, {"runtimes": ("vllm",), "settings": {"a": 64.0}}),
        (ReadOptions, {"enable_lora": {"qkv": "1,0,1"}}, {"enable_lora": {"qkv": (True, False, True)}}),
        (VerifyOptions, {"fixed": {"sequence": "128"}, "candidate": "x"}, {"fixed": {"sequence": 128}}),
        (TrainOptions, {"rank_pattern": {"a=b": 4}, "columns": None}, {"rank_pattern": {"a=b": 4}, "columns": None}),
        (GenerateOptions, {"prompts": "Once"}, {"prompts": ("Once",)}),
        (OnnxOptions, {"target": "all-linear", "overwrite": np.True_}, {"target": "all-linear", "overwrite": True}),
        (TrainOptions, {"rank": np.int32(4)}, {"rank": 4}),
        (OnnxOptions, {"overwrite": None, "dtype": None, "adapters": None, "on_message": None}, LEFT_OUT),
    ],
)
def test_values_are_those_of_python_and_several_are_a_sequence(record, given, taken):
    needed = {"adapter", "base", "tuned", "output", "model", "data", "source", "prompts"}
    arguments = {one.name: "x" for one in options_of(record) if one.name in needed and one.default is MISSING}
    options = record(**arguments | given)
    assert {name: getattr(options, name) for name in taken} == taken
    assert all(type(getattr(options, name)) is type(value) for name, value in taken.items())


def test_a_path_is_whatever_the_system_takes_for_one(tmp_path):
    (tmp_path / "base").mkdir()
    (entry,) = os.scandir(tmp_path)
    options = MergeOptions(entry, entry, entry)
    assert options.base == options.adapters == options.output == tmp_path / "base"


@pytest.mark.parametrize(
    ("given", "base", "message"),
    [
        ({"requantize": True}, "checkpoint", "--requantize is for an .onnx BASE: --keep-quantised merges into"),
        ({"keep_quantised": True}, "graph", "--keep-quantised is for checkpoints: --requantize merges into the quan"),
        (
            {"keep_quantised": True, "dequantize": True},
            "checkpoint",
            "--keep-quantised does not go together with --dequantize: a weight is kept or made a float",
        ),
        (
            {"keep_quantised": True, "dtype": "float16"},
            "checkpoint",
            "--keep-quantised does not go together with --dtype: the scheme of BASE decides",
        ),
        ({"variant": "fp16"}, "graph", "--variant is for folders of checkpoints, which may have several sets"),
        ({"dequantize": True}, "graph", "--dequantize is for checkpoints: --requantize merges into the quantised"),
        (
            {"dtype": "float16"},
            "gguf",
            "--dtype is not for a GGUF file: its weights keep their types, or get those of --dtype-of",
        ),
        ({"tied": "both"}, "pipeline", "--tied is not for a pipeline. Give the folder of one of its models as BASE"),
        ({"float_base": "f"}, "checkpoint", "--float-base needs --dequantize: it is compared with the weights"),
        (
            {"keep_residual": "r", "dequantize": True},
            "checkpoint",
            "--keep-residual does not go together with --dequantize: keep the quantised base itself",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(given, base, message):
    options = MergeOptions("base", ["a"], "out", **given)
    with as_command_line(declared_flags), pytest.raises(WrongUsage, match=message):
        options.check_usage(base=base)


def test_a_function_of_a_record_has_its_keywords():
    @takes(MergeOptions)
    def merged(options: MergeOptions) -> MergeOptions:
        """Merge it."""
        return options

    found = merged("base", ["a"], output="out", dtype="float16", combination="ties" and Combination("ties", 0.5))
    assert (found.base, found.output, found.dtype, found.combined.density) == ("base", "out", "float16", 0.5)
    parameters = inspect.signature(merged).parameters
    assert list(parameters)[:3] == ["base", "adapters", "output"] and parameters["dtype"].default == "keep"
    assert merged.__doc__.startswith("Merge it.\n\nOptions:") and "    dtype: Type in which" in merged.__doc__
    with pytest.raises(TypeError, match=r"^merged\(\) got an unexpected keyword argument 'dtpye'"):
        merged("base", ["a"], "out", dtpye="float16")
    with pytest.raises(TypeError, match=r"^merged\(\) got multiple values for argument 'adapters'"):
        merged("base", "out", adapters=["a"])


def test_help_names_options_as_each_door_spells_them():
    (option,) = (one.option for one in options_of(OnnxOptions) if one.name == "names")
    with as_command_line(declared_flags):
        assert option.help_text().startswith("With --lora inputs and slots: naming convention")
        assert 'With lora="inputs" and slots: naming convention' in documentation(OnnxOptions)  # Python's own
    assert option.help_text().startswith('With lora="inputs" and slots: naming convention')


def test_records_are_extended_and_parts_of_them_taken():
    class More(Weighted):
        pass

    options = TrainOptions("base", "data", "out", epochs=5)
    assert narrowed(options, TrainingSettings, batch_size=1) == TrainingSettings(epochs=5, batch_size=1)
    assert extended(Weighted(weights=(2.0,)), More, prefixes={"a": "b"}).weights == (2.0,)
    assert options.chosen() == {"model": "base", "data": "data", "output": "out", "epochs": 5}
    assert options.chosen_of(TrainingSettings) == {"epochs": 5}


def test_a_record_that_narrows_types_keeps_what_its_fields_mean():
    given = VerifyOptions("m.onnx", "base", fixed={"batch": 2}, onnx_adapter="fr.onnx_adapter")
    request = extended(given, VerifyRequest, candidate=Path("m.onnx"), base=None, fixed={"batch": 2})
    assert set(request.chosen_of(Judging)) == {"fixed", "onnx_adapter"}
    assert {one.name for one in options_of(VerifyRequest)} == {one.name for one in options_of(VerifyOptions)}
    untouched = extended(VerifyOptions("merged", base="b"), VerifyRequest, candidate=Path("merged"), fixed={})
    assert untouched.chosen_of(Judging) == {}


@pytest.mark.parametrize("record", RECORDS.values())
def test_what_type_checkers_do_not_see_has_the_right_type(record):
    own = [*options_of(record), *(one for nested in nested_in(record).values() for one in options_of(nested.record))]
    for one in own:
        assert isinstance(one.option.flags, tuple) and isinstance(one.option.help, str), one.name
        assert isinstance(one.option.only, tuple) and all(isinstance(each, Only) for each in one.option.only), one.name
        assert all(isinstance(each.values, tuple) and each.values for each in one.option.only), one.name
