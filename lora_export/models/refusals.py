"""Why a model or an exporter failed: the innermost cause in one sentence, the line of the model's code, a way out."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.errors import LoraExportError, RuntimeRefused
from lora_export.isolation.bounds import is_out_of_memory
from lora_export.models.tracing import same_state
from lora_export.options.spelling import named

LONGEST = 400  # characters of a cause: some contain tensors
# Of torch.onnx, where no function of ONNX computes an operator of PyTorch
MISSING_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
FRAME = re.compile(r'File "[^"]*?([^"/\\]+)", (line \d+, in \S+)\n\s*(.+)')  # of a Python traceback
CHANGE_THE_LINE = (
    "Change that line of the model's code, so that it computes with the size itself, or export only the part of the "
    "model that a graph can contain."
)
DEPENDS_ON_VALUES = (
    "Change that line of the model's code (a graph cannot contain Python code that depends on values), or "
    "export only the part of the model that a graph can contain."
)
LINE = re.compile(r", line \d+, in ")  # of a model's code
OF_HALF = re.compile(r"`.*\btorch\.float16\b.*`")  # a line of BART's encoder looks for overflow in this precision
FIXED_SIZE = re.compile("specialized it to be a constant|inferred a static shape")  # of a dimension that is to vary
OWN_CODE, OF_PYTORCH = Path(__file__).parents[1], Path(torch.__file__).parent
NOT_IN_ONNX = "Compute it there with operators that ONNX has, or export only the part of the model before it."


@contextlib.contextmanager
def named_failures(module: nn.Module, inputs: Iterable[str], which: str = "inputs", remedy: str = "") -> Iterator[None]:
    """Turn an exception of the module's forward into RuntimeRefused, with its cause in one sentence.

    `inputs` are the names of what the module is called with, and `which` is what the message calls them.
    `remedy` ends it.
    """
    try:
        yield
    except Exception as error:
        _raise_other_failure(error)
        raise RuntimeRefused(
            f"{type(module).__name__} itself fails on the {which} ({', '.join(inputs)}): {innermost_cause(error)}"
            f"{remedy and f'. {remedy}'}"
        ) from error


def _raise_other_failure(error: BaseException) -> None:
    """Raise the innermost cause that is no fault of the model: a refusal of this package, or too little memory."""
    cause: BaseException | None = error
    found = None
    while cause is not None:
        if isinstance(cause, LoraExportError | torch.OutOfMemoryError) or is_out_of_memory(cause):
            found = cause
        cause = cause.__cause__
    if found is not None:
        raise found


def failure_on(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> str:
    """Why the module fails on these inputs; empty where it runs."""
    try:
        with named_failures(module, inputs), torch.no_grad(), same_state(module):
            module(**inputs)
    except RuntimeRefused as error:
        return str(error)
    return ""


def innermost_cause(error: BaseException) -> str:
    """The first paragraph of the innermost cause's message, and the line of the model that it names."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip()
    first = " ".join(message.partition("\n\n")[0].split())
    line = re.search(r"The following call raised this error:\s+File \"[^\"]*?([^\"/\\]+)\", (.+)\n\s*(.+)", message)
    first = f"{first[:LONGEST]} ..." if len(first) > LONGEST else first
    where = f" ({line[1]}, {line[2].strip()}: `{line[3].strip()}`)" if line else ""
    return f"{first or type(error).__name__}{where}"


@contextlib.contextmanager
def exporter_refusals(module: nn.Module) -> Iterator[None]:
    """Turn an exception of an exporter into RuntimeRefused, with its cause in one sentence, and a way out."""
    try:
        yield
    except Exception as error:
        _raise_other_failure(error)
        cause, remedy = innermost_cause(error), DEPENDS_ON_VALUES
        if missing := MISSING_OPERATOR.search(cause):
            cause, remedy = f"ONNX has no operator for {missing[1]}{_place(error)}", NOT_IN_ONNX
        elif fixes_size(error):
            cause += "".join(getattr(error, "__notes__", ())) or line_of_size(error)
        elif not LINE.search(cause):
            line, place = line_of_model(module, error), _place(error)
            cause, remedy = cause + (line or place), NOT_IN_ONNX if place and not line else remedy
        if not missing and OF_HALF.search(cause) and any(each.dtype == torch.float16 for each in module.parameters()):
            remedy = f"Where that line is about float16 alone, export in {named('dtype', 'float32')}. {remedy}"
        raise RuntimeRefused(f"the exporter refused {type(module).__name__}: {cause}", remedy) from error


def fails_on_node(error: BaseException) -> bool:
    """Whether an exporter traced the model, and refused an operator of it."""
    return _failing_node(error) is not None


def fixes_size(error: BaseException) -> bool:
    """Whether an exporter refused a dimension that is to vary, since the model's code fixes its size."""
    return FIXED_SIZE.search(innermost_cause(error)) is not None


def _place(error: BaseException) -> str:
    """The module and the line of the model's code that made the node on which the exporter failed; empty if unknown."""
    node = _failing_node(error)
    if node is None:
        return ""
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    line = f"{frames[-1][0]}, {frames[-1][1]}: `{frames[-1][2].strip()}`" if frames else ""
    parts = [f"in the module {modules[-1]}" if modules else "", line]
    found = "; ".join(part for part in parts if part)
    return f" ({found})" if found else ""


def _failing_node(error: BaseException) -> torch.fx.Node | None:
    """The node of the program that torch.onnx was about to translate: no exception has it but in its frames."""
    found = (names.get("node") for names in _frames(error))
    return next((node for node in found if isinstance(node, torch.fx.Node)), None)


def line_of_model(module: nn.Module, error: BaseException | None) -> str:
    """The last line of the model's own files that ran before an error; empty where there is none."""
    files, found = code_files(module), ""
    while error is not None:
        found = innermost_line(traceback.extract_tb(error.__traceback__), files) or found
        error = error.__cause__
    return found


def code_files(module: nn.Module) -> set[Path]:
    """The files with the code of a module and its parts, but for PyTorch's and this package's."""
    modules = (sys.modules.get(type(part).__module__) for part in module.modules())
    files = {Path(file) for each in modules if (file := getattr(each, "__file__", None))}
    return {file for file in files if not any(map(file.is_relative_to, (OWN_CODE, OF_PYTORCH)))}


def innermost_line(frames: Sequence[traceback.FrameSummary], files: Collection[Path]) -> str:
    """The last of these frames that is in one of the files, as a message shows it; empty where there is none."""
    return next((_shown(frame) for frame in reversed(frames) if Path(frame.filename) in files), "")


def line_of_size(error: BaseException) -> str:
    """The line of the model's code that fixed a size in a trace; empty if unknown. Only frames of PyTorch have it."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it imports SymPy, which a proof does not need

    for names in _frames(error):
        for value in list(names.values()):
            # Not by getattr: a model's own `__getattr__` may raise anything.
            sizes: Any = value if isinstance(value, ShapeEnv) else inspect.getattr_static(value, "shape_env", None)
            for symbol, place in sizes.replacements_slocs.items() if isinstance(sizes, ShapeEnv) else ():
                frame = place.framework_loc
                if not isinstance(frame, traceback.FrameSummary) or not sizes.replacements[symbol].is_number:
                    continue
                if frame.line and not any(map(Path(frame.filename).is_relative_to, (OWN_CODE, OF_PYTORCH))):
                    return _shown(frame)
    return ""


def _shown(frame: traceback.FrameSummary) -> str:
    return f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: `{(frame.line or '').strip()}`)"


def _frames(error: BaseException | None) -> Iterator[Mapping[str, Any]]:
    """The local variables of every frame that an exception and its causes passed."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            yield trace.tb_frame.f_locals
            trace = trace.tb_next
        error = error.__cause__
