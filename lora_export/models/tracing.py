"""A module as exporters need it: in eval mode, silent, without its cache, its outputs named and its failures explained.

Exporters take no dataclasses: a module that returns one returns a dictionary instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import logging
import re
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.errors import LoraExportError, RuntimeRefused
from lora_export.isolation.bounds import is_out_of_memory
from lora_export.layers.torch_internals import exchange_forward
from lora_export.models.model import ModelInputs
from lora_export.models.stored_parameter import StoredParameter
from lora_export.models.traceable_code import traceable_code
from lora_export.options.spelling import named

USE_CACHE = "use_cache"


def disable_cache(config: Any) -> None:
    """Set `use_cache` to false in a config and in the configs inside it.

    A composite model reads the setting of the part that has the cache, such as `text_config`, not its own.
    """
    for part in _parts(config):
        if getattr(part, USE_CACHE, False):
            setattr(part, USE_CACHE, False)


@contextlib.contextmanager
def cache_setting(module: nn.Module, *, to: bool) -> Iterator[None]:
    """A model of transformers with this value of `use_cache` in all configs that have one, while active."""
    configs = [getattr(part, "config", None) for part in module.modules()]
    parts = {id(part): part for config in configs for part in _parts(config)}
    changed = [part for part in parts.values() if getattr(part, USE_CACHE, to) != to]
    for part in changed:
        setattr(part, USE_CACHE, to)
    try:
        yield
    finally:
        for part in changed:
            setattr(part, USE_CACHE, not to)


def _parts(config: Any) -> Iterator[Any]:
    """A config of transformers and every config inside it."""
    if not hasattr(config, "model_type"):
        return
    yield config
    for value in list(vars(config).values()):
        yield from _parts(value)


def is_hugging_face(module: nn.Module) -> bool:
    """Whether transformers knows how to export the module. Does not import transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def without_cache(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A module that makes no cache while the context is active; nothing but transformers' models makes one."""
    return cache_setting(module, to=False) if is_hugging_face(module) else contextlib.nullcontext()


@contextlib.contextmanager
def tracing(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no output, and no fused attention kernels: a trace would capture them as opaque calls.

    Code that a trace cannot follow is exchanged (see `traceable_code`). The module's own modes are restored afterwards.
    """
    training = [part for part in module.modules() if part.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), silence(), same_state(module), traceable_code(module):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part in training:
            part.training = True


REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks")  # of an nn.Module, which are dictionaries


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Show no warning of transformers. `logging.disable` visits all loggers, longer than a small model runs."""
    handlers = [*logging.root.handlers, *logging.getLogger("transformers").handlers]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(max(handler.level, logging.ERROR))
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


@contextlib.contextmanager
def same_state(module: nn.Module) -> Iterator[None]:
    """A model of transformers has the attributes and children afterwards that it has now; its tensors are not copied.

    Some models keep what they chose for one input for all later ones: after a short text, BigBird attends to all tokens
    of a long one, too. SegFormer adds hooks at its first run, and an attribute for that. Without the attribute alone,
    each run would add them again, and collect its hidden states twice.
    """
    parts = list(module.modules()) if is_hugging_face(module) else []
    before = [{name: _held(name, value) for name, value in vars(part).items()} for part in parts]
    try:
        with _no_warnings() if parts else contextlib.nullcontext():  # they tell of such a choice, now in each run
            yield
    finally:
        for part, attributes in zip(parts, before, strict=True):
            for name in vars(part).keys() - attributes:
                del vars(part)[name]
            for name, value in attributes.items():
                if name not in REGISTRIES:
                    vars(part)[name] = value
                    continue
                now = vars(part)[name]
                if list(map(id, now.values())) != list(map(id, value.values())):
                    now.clear()
                    now.update(value)


def _held(name: str, value: Any) -> Any:
    return dict(value) if name in REGISTRIES else value


def state_reader(module: nn.Module) -> Callable[[], bool]:
    """A function that returns whether all parts of a module still have the attributes, children and values of now.

    Seen are also other entries of a dictionary, list or set of theirs, and tensors that were changed in place.
    """
    parts = list(module.modules())
    before = _state(parts)

    def is_as_before() -> bool:
        now = _state(parts)
        return len(now) == len(before) and all(map(_is_same, before, now))

    return is_as_before


@contextlib.contextmanager
def attribute_writes(modules: Iterable[nn.Module]) -> Iterator[list[str]]:
    """The names of attributes that are set on parts of modules while the context is active, also those put back."""
    parts = {id(part) for module in modules for part in module.modules()}
    written: list[str] = []
    before = nn.Module.__setattr__

    def noted(self: nn.Module, name: str, value: Any) -> None:
        if id(self) in parts:
            written.append(name)
        before(self, name, value)

    nn.Module.__setattr__ = noted  # type: ignore[method-assign]
    try:
        yield written
    finally:
        nn.Module.__setattr__ = before  # type: ignore[method-assign]


def _state(parts: Iterable[nn.Module]) -> list[Any]:
    return [each for part in parts for name, value in vars(part).items() for each in (name, value, *_inside(value))]


def _inside(value: Any) -> list[Any]:
    """The entries of a container, and how often its tensors, or the tensor, were changed in place."""
    entries: list[Any] = [*value.keys(), *value.values()] if isinstance(value, dict) else []
    entries += value if isinstance(value, list | set | deque) else ()
    tensors = (one for one in (value, *entries) if isinstance(one, torch.Tensor))
    counted = (one for one in tensors if not isinstance(one, StoredParameter) and not one.is_inference())
    return [*entries, *(one._version for one in counted)]  # a stored parameter cannot be changed, and is not read here


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int) and one == other)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what the exporters print, warn and log. The exception that they raise has all that matters."""
    disabled, discarded = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(discarded),
            contextlib.redirect_stderr(discarded),
        ):
            yield
    finally:
        logging.disable(disabled)


# --- Failures ---

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
    except (LoraExportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeRefused(
            f"{type(module).__name__} itself fails on the {which} ({', '.join(inputs)}): {innermost_cause(error)}"
            f"{remedy and f'. {remedy}'}"
        ) from error


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


# --- of exporters ---


@contextlib.contextmanager
def exporter_refusals(module: nn.Module) -> Iterator[None]:
    """Turn any exception of an exporter into RuntimeRefused, with its cause in one sentence, and a way out."""
    try:
        yield
    except Exception as error:
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


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors in a module's outputs, by a mapping's own keys, or as `output_0`, `output_1` … in order.

    The names of nested tensors are joined with a dot. Values that are no tensors are left out. Raises
    RuntimeRefused where no tensor is found.
    """
    named = dict(_named(outputs))
    if not named:
        raise RuntimeRefused(f"the model returned {type(outputs).__name__}, which contains no tensors")
    return named


def have_names(outputs: Mapping[str, Any]) -> bool:
    """Whether a model named its outputs. False where `named_outputs` did, so that only their order has a meaning."""
    return not all(name.startswith("output_") for name in outputs)


def _named(outputs: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(outputs, torch.Tensor):
        yield prefix or "output_0", outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _named(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(outputs, tuple | list):
        for number, value in enumerate(outputs):
            yield from _named(value, f"{prefix}.{number}" if prefix else f"output_{number}")


# --- dataclasses ---


def with_dictionaries(module: nn.Module, example_inputs: ModelInputs) -> nn.Module:
    """The module itself; if it returns a dataclass for these inputs, it returns its fields by name from now on.

    Runs it once. A module that fails is left as it is: the next run reports the failure.
    """
    with contextlib.suppress(Exception), torch.no_grad():
        if _has_dataclass(module(**example_inputs)):
            convert_outputs(module, _as_dictionaries)
    return module


def convert_outputs(module: nn.Module, convert: Callable[[Any], Any]) -> None:
    """Let a module return what `convert` makes of its outputs, from now on."""
    cls = type(module)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return convert(cls.forward(self, *args, **kwargs))

    exchange_forward(module, forward)


def _as_dictionaries(value: Any) -> Any:
    """The value with every dataclass as a dictionary of those of its fields that are not None."""
    if _is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _as_dictionaries(each) for name, each in fields.items() if each is not None}
    return type(value)(map(_as_dictionaries, value)) if type(value) in (tuple, list) else value


def _has_dataclass(value: Any) -> bool:
    return _is_dataclass(value) or (type(value) in (tuple, list) and any(map(_has_dataclass, value)))


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping)  # transformers' outputs are both
