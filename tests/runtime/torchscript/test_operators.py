"""The list of operators that are run from TorchScript files."""

from __future__ import annotations

import torch

from lora_export.runtime.torchscript.operators import SCRIPT_OPERATORS, TENSOR_OPERATORS, VALUE_OPERATORS

REGISTERED = {schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas()}


def test_no_listed_operator_touches_files_processes_or_foreign_memory() -> None:
    suspicious = (
        "file",
        "save",
        "print",
        "fork",
        "rpc",
        "wait",
        "set_data",
        "resize",
        "sparse",
        "set_source",
    )
    assert not [name for name in SCRIPT_OPERATORS if any(word in name for word in suspicious)]
    assert not {"set_", "_print", "open", "import"} & SCRIPT_OPERATORS


def test_every_listed_name_is_an_operator_of_this_pytorch() -> None:
    names = {*TENSOR_OPERATORS.split(), *VALUE_OPERATORS.split()}
    assert names - REGISTERED - {name for name in names if f"{name}_" in REGISTERED} == set()
