"""Imports only go down, and `--help` stays light."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_export
from lora_export.cli import COMMANDS
from support import offenders

PACKAGE = Path(lora_export.__file__).parent

# From the ground up: an entry of the package imports only entries that stand before it. `plan` stands low because
# every holder of weights (checkpoint, module, graph) describes them in its TensorSpecs.
GROUND = (
    *("version", "callbacks", "isolation", "errors", "extras", "notebook", "lora", "options", "workers", "pairs"),
    *("names", "plan", "sums", "adapters", "storage", "user_code", "provenance", "formats"),
)
ORDER = (
    *GROUND,
    *("weights", "layers", "graph", "artifacts", "preflight", "models", "training", "runtime"),
    *("verification", "report", "api", "fleet", "testing", "cli"),
)
# What does the work: none of these needs another.
DOERS = (
    *("weights.merge", "layers", "graph", "models.export", "training.loop"),
    *("runtime.torch_runners", "runtime.session", "verification.parity"),
)
PRIVATE_NAMES = "lora_export.layers.torch_internals"  # of PyTorch, which do no work
NUMPY_CORE = (
    *GROUND,
    *("weights", "graph", "artifacts", "preflight", "report"),
    *("training.records", "training.row_forms"),
    *("runtime.environment", "runtime.environment_probes"),
    *("runtime.ort_session", "runtime.runner", "runtime.onnx_runner", "runtime.session"),
    *("runtime.generation.decoder", "runtime.generation.loop"),
    *("verification.parity", "verification.proof", "verification.compare_outputs"),
    "verification.candidate_outputs",
    *("verification.against_graph", "verification.against_checkpoint", "verification.inputs.graph_inputs"),
    *("verification.references.graph_with_adapter", "verification.references.graph_fp64"),
    *("verification.diagnose.diagnosis", "verification.diagnose.root_cause"),
)
TORCH_BY_REQUEST = {
    "lora_export.storage.torch_pickle",  # reads a pickle, where --allow-pickle is given
    "lora_export.storage.distributed_checkpoint",  # the same
    "lora_export.weights.cuda",  # a merge's arithmetic on a GPU, where that was asked for
    "lora_export.runtime.environment_probes",  # imports every package to see whether it works, each in its own process
}
BASE_OF_THE_PACKAGE = ""  # lora_export/__init__.py: the version, and names that are loaded when asked for

HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "accelerate"}
NOT_IN_THE_CORE = {"torch", "transformers", "accelerate", "onnxruntime"}
# `session` runs where nothing else of ours does; only onnxruntime writes its adapters' format, when it is asked to.
MAY_IMPORT_ONNXRUNTIME = {
    *("lora_export.runtime.onnx_runner", "lora_export.runtime.session", "lora_export.runtime.environment_probes"),
    "lora_export.formats.onnx_adapter",
}


def module_name(path: Path) -> str:
    parts = ("lora_export", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> str:
    """`graph` for lora_export.graph.sites; the base of the package has no name."""
    return module.partition(".")[2].partition(".")[0]


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, in full; `from x import y` is x.y where that is a file."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            if called.endswith("import_module"):
                yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


@functools.cache
def imports_of(module: str) -> set[str]:
    return set(imported(module, ast.parse(MODULES[module].read_text(encoding="utf-8"))))


def layers_below(module: str) -> set[str]:
    names = {name for name in imports_of(module) if name.partition(".")[0] == "lora_export"}
    return {layer(name) for name in names} - {layer(module), BASE_OF_THE_PACKAGE}


def within(module: str, places: Iterable[str]) -> str | None:
    """The one of these places (packages or modules of ours) that a module is, or is in."""
    name = module.partition(".")[2]
    return next((place for place in places if f"{name}.".startswith(f"{place}.")), None)


LAYERED = [name for name in MODULES if layer(name) not in (BASE_OF_THE_PACKAGE, "__main__")]


def test_every_file_has_its_place_in_the_order():
    assert {layer(module) for module in LAYERED} <= set(ORDER), "a new layer: give it its place in ORDER"


def test_imports_only_go_down():
    below = {place: set(ORDER[:number]) for number, place in enumerate(ORDER)}
    assert offenders({module: layers_below(module) - below[layer(module)] for module in LAYERED}) == {}


def test_nothing_imports_in_a_circle():
    files_below = {module: imports_of(module) & set(MODULES) - {module} for module in LAYERED}
    TopologicalSorter(files_below).prepare()  # raises CycleError, with the circle


def test_a_plan_knows_no_holder_of_weights():
    plans = [module for module in LAYERED if layer(module) in ("plan", "sums")]
    ground = {"errors", "lora", "notebook", "options", "pairs", "names", "plan"}
    assert plans and offenders({module: layers_below(module) - ground for module in plans}) == {}


def test_no_verdict_is_by_the_arithmetic_of_a_merge():
    judges = [module for module in LAYERED if layer(module) == "verification"]
    assert judges and offenders({module: imports_of(module) & {"lora_export.sums"} for module in judges}) == {}


def test_doers_do_not_import_each_other():
    others = {}
    for module in (module for module in LAYERED if within(module, DOERS)):
        doers = {within(name, DOERS) for name in imports_of(module) - {PRIVATE_NAMES}}
        others[module] = doers - {None, within(module, DOERS)}
    assert others and offenders(others) == {}


CORE = [module for module in LAYERED if within(module, NUMPY_CORE) and module not in TORCH_BY_REQUEST]


def packages(module):
    return {name.partition(".")[0] for name in imports_of(module)}


def test_the_core_is_numpy():
    excused = {module: {"onnxruntime"} & imports_of(module) for module in MAY_IMPORT_ONNXRUNTIME}
    found = {module: (packages(module) & NOT_IN_THE_CORE) - excused.get(module, set()) for module in CORE}
    assert found and offenders(found) == {}


def test_onnxruntime_is_imported_in_one_place():
    assert {module for module in MODULES if "onnxruntime" in packages(module)} <= MAY_IMPORT_ONNXRUNTIME


# --- what is really loaded ---


# From light to heavy, one after the other in one interpreter.
STATEMENTS = {
    "package": "import lora_export",
    "help": "from lora_export.cli import run; assert run(['--help']) == 0",
    "help of commands": f"for command in {list(COMMANDS)}: assert run([command, '--help']) == 0",
    "inspection": "import lora_export.api.inspect, lora_export.cli.inspection",
    "core": f"import lora_export.runtime.environment, {', '.join(CORE)}",
    "proof": "import lora_export.verification.against_pytorch",
}
LOADED = "json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The top-level packages that a fresh interpreter has loaded after each statement, less those it starts with."""
    steps = [f"{each}\nprint('\\n' + {LOADED}, file=sys.stderr)" for each in STATEMENTS.values()]
    code = "\n".join(["import json, sys; before = set(sys.modules)", *steps])
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    found = [set(json.loads(line)) for line in child.stderr.splitlines() if line.startswith("[")]
    return dict(zip(STATEMENTS, found, strict=True))


def test_importing_the_package_loads_nothing_but_itself(loaded):
    assert loaded["package"] - sys.stdlib_module_names <= {"lora_export"}


def test_help_loads_nothing_but_click(loaded):
    assert "click" in loaded["help"] and loaded["help"] - sys.stdlib_module_names <= {"lora_export", "click"}


def test_the_help_of_no_command_loads_anything_heavy(loaded):
    assert loaded["help of commands"] & HEAVY == set()


def test_inspecting_an_adapter_does_not_wait_for_what_reads_graphs(loaded):
    assert "numpy" in loaded["inspection"] and loaded["inspection"] & {"onnx", "onnx_ir", "sympy"} == set()


def test_the_core_loads_without_torch(loaded):
    assert loaded["core"] & NOT_IN_THE_CORE == set()


def test_a_proof_does_not_wait_for_what_only_an_export_uses(loaded):
    assert "torch" in loaded["proof"]
    assert loaded["proof"] & {"onnxscript", "onnxruntime", "transformers"} == set()
