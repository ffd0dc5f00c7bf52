"""The list of operators that are run from TorchScript files."""

from __future__ import annotations

import sys

import pytest
import torch
from packaging.version import Version

from lora_export.errors import InputRefused
from lora_export.runtime.torchscript.code_check import ON_TENSORS, ON_VALUES, SCRIPT_OPERATORS, check_code, check_pickle

TORCH = Version(torch.__version__)
REGISTERED = {schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas()}


def test_no_listed_operator_touches_files_processes_or_foreign_memory() -> None:
    suspicious = ("file", "save", "print", "fork", "rpc", "wait", "set_data", "resize", "sparse", "set_source")
    assert not [name for name in SCRIPT_OPERATORS if any(word in name for word in suspicious)]
    assert not {"set_", "_print", "open", "import"} & SCRIPT_OPERATORS


def test_every_listed_name_is_an_operator_of_this_pytorch() -> None:
    later = {"_upsample_lanczos2d_aa"} if Version("2.13") > TORCH else set()
    names = (ON_TENSORS | ON_VALUES) - later
    assert names - REGISTERED - {name for name in names if f"{name}_" in REGISTERED} == set()


# --- code check ---

MODULE = """class M(Module):
  __parameters__ = []
  training : bool
  def forward(self: __torch__.M,
    x: Tensor) -> Tensor:
    LINE
    return x
"""


def check(line: str, module: str = MODULE) -> None:
    check_code({"code/__torch__.py": module.replace("LINE", line)}, REGISTERED)


@pytest.mark.parametrize(
    "line",
    [
        "x0 = torch.add(x, x)",
        "weight = torch._weight_norm(x, x)",  # of the convolution of positions in wav2vec 2.0 and SpeechT5
        "x0 = (self).forward(x, )",
        "x0, y, = (self.part).forward(x, )",
        "_1 = __torch__.torch.nn.functional.relu\n    x0 = _1(x, )",
        "for _0 in range(torch.len(x)):\n      _1 = __torch__.f\n      y = _1(x, )",
        "with __torch__.no_grad.__new__(__torch__.no_grad):\n      pass",
        "y = annotate(List[int], [])",
        "y = ops.prim.device(x)",
        "y = torch.linalg_solve(x, CONSTANTS.c0)",
        'y = torch.format("{} \\n \\"quoted\\"", 3)',
        'if torch.eq(torch.dim(x), 1):\n      pass\n    else:\n      ops.prim.RaiseException("x", "E")',
        "y = torch.relu_(x)",
        "y = getattr(self, '0')",
    ],
)
def test_code_of_models_passes(line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("y = torch.from_file('/x', True, 9)", "'torch.from_file'"),
        ("y = torch.save(x, '/x')", "'torch.save'"),
        ("y = x.from_file(True, 9)", "'from_file'"),
        ("y = torch.from_file", "'torch.from_file'"),
        ("y = torch.ops.aten.add(x, x)", "'torch.ops.aten.add'"),
        ("y = ops.aten.from_file('/x')", "'ops.aten.from_file'"),
        ("y = ops.prim.Print(x)", "'ops.prim.Print'"),
        ("print(x)", "'print'"),
        ("y = fork(x)", "'fork'"),
        ("y = f(x)", "'f'"),
        ("f = x.save\n    y = f('/x')", "'f'"),
        ("f = __torch__.g\n    f = torch.add\n    y = f(x, x)", "'f'"),
        ("f = getattr(x, 'save')\n    y = f('/x')", "'f'"),
        ("y = (x[0])(3)", "calls a value"),
        ("y = __torch__.torch.classes.quantized.LinearPackedParamsBase", "custom C"),
        ("import os", "Import is not part"),
        ("y = lambda z: z", "Lambda is not part"),
        ("global y", "Global is not part"),
        ("y = 'a' f'b'", "prefix" if sys.version_info < (3, 12) else "JoinedStr is not part"),
        ("y = 1  # comment", "a comment in line 6"),
        ("y = 1; z = 2", "a semicolon"),
        ("y = 1 + \\\n      2", "continued by a backslash"),
        ("y = '''a'''", "prefix"),
        ("y\x0c = 1", "control character"),
        ("ỳ = 1", "not ASCII"),
        ("y = (", "not the code"),
        ("y = " + "(" * 300 + ")" * 300, "not the code"),
    ],
)
def test_everything_else_is_refused_by_name(line: str, named: str) -> None:
    with pytest.raises(InputRefused, match=r"code/__torch__\.py") as refused:
        check(line)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_operator_hidden_behind_a_method_is_refused() -> None:
    hidden = MODULE + "  def from_file(self: __torch__.M, x: Tensor) -> Tensor:\n    return x\n"
    with pytest.raises(InputRefused, match="defines 'from_file', the name of an operator"):
        check("y = '/x'.from_file(True, 9)", hidden)


def test_decorator_is_refused() -> None:
    with pytest.raises(InputRefused, match="forward has a decorator"):
        check("pass", MODULE.replace("  def", "  @staticmethod\n  def"))


def test_pickle_with_a_custom_class_is_refused() -> None:
    check_pickle("data.pkl", b"c__torch__\nM\n)\x81.")
    with pytest.raises(InputRefused, match="custom C"):
        check_pickle("data.pkl", b"c__torch__.torch.classes.nnapi\nCompilation\n)\x81.")
