"""A short command starts sooner in a process of its own, and leaves everybody else's process as it is."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

import ml_dtypes
import numpy as np
import pytest

from lora_export import cli
from lora_export.cli import startup
from support.handmade import base_file, graph_file, peft_adapter


def told_by(code: str) -> dict[str, object]:
    """What a fresh interpreter prints as the last line, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, "-c", f"import json, sys, gc, os\n{code}"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert child.returncode == 0, child.stderr
    told: dict[str, object] = json.loads(child.stdout.splitlines()[-1])
    return told


OURS = """
from lora_export.cli import startup
finders, thresholds = len(sys.meta_path), gc.get_threshold()
startup.take_process()
with startup.brisk():
    import onnx_ir as ir
    dim = ir.SymbolicDim("tokens")
    collecting = gc.isenabled()
"""
FORKS = """
for code in map(json.loads, sys.stdin):
    if os.fork() == 0:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    if os.wait()[1]:
        print(flush=True)
"""


@pytest.fixture(scope="module")
def told_by_ours() -> Iterator[Callable[[str], object]]:
    """As `told_by`, in a copy of one process that has run `OURS`."""
    command = [sys.executable, "-c", f"import json, sys, gc, os\n{OURS}{FORKS}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def told(code: str) -> object:
            print(json.dumps(code), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield told
        process.stdin.close()


def test_what_nobody_uses_is_not_imported(told_by_ours):
    assert told_by_ours("print(json.dumps([name for name in sys.modules if name.startswith('sympy.')]))") == []


def test_what_was_put_off_is_whole_when_it_is_used(told_by_ours):
    use = """
total = str((dim + 1).value)
import sympy.polys
print(json.dumps([total, str(sympy.Symbol("x") * 2), type(sympy).__name__, sympy.polys.__name__]))
"""
    assert told_by_ours(use) == ["tokens + 1", "2*x", "module", "sympy.polys"]


PUT_OFF = ["ipaddress", "tokenize"] if sys.version_info < (3, 13) else ["tokenize"]  # pathlib imported the first one
PUT_OFF_BY_OURS = "[name for name in startup.DEFERRED if '__getattr__' in vars(sys.modules.get(name, gc))]"


@pytest.mark.parametrize(("program", "put_off"), [("lora-export", PUT_OFF), ("script.py", [])])
def test_the_command_line_imports_less_in_a_process_of_its_own(program, put_off):
    code = f"sys.modules['__main__'].__file__ = {program!r}\nfrom lora_export.cli import startup, command_named"
    told = told_by(f"{code}\ncommand_named('merge')\nprint(json.dumps([{PUT_OFF_BY_OURS}, gc.isenabled()]))")
    assert [sorted(told[0]), told[1]] == [put_off, True]


def test_what_is_imported_twice_is_still_put_off(told_by_ours):
    assert "pickle" in told_by_ours(f"import pickle, tokenize\nprint(json.dumps({PUT_OFF_BY_OURS}))")
    assert told_by_ours("import pickle\nprint(json.dumps(pickle.loads(pickle.dumps(5))))") == 5


def test_a_version_is_found_without_the_package_email(told_by_ours):
    use = """
import onnx, importlib.metadata as metadata
versions, early = [onnx.__version__, metadata.version("onnx")], "email" in sys.modules
print(json.dumps([versions, early, metadata.distribution("onnx").version, "email" in sys.modules]))
"""
    version = metadata.version("onnx")
    assert told_by_ours(use) == [[version, version], False, version, True]


def test_metadata_of_an_edited_package_counts_where_it_comes_first(told_by_ours, tmp_path):
    (tmp_path / "onnx.egg-info").mkdir()
    (tmp_path / "onnx.egg-info/PKG-INFO").write_text("Metadata-Version: 2.1\nName: onnx\nVersion: 9.9\n")
    use = f"""
sys.path.insert(0, {str(tmp_path)!r})
import importlib.metadata as metadata
print(json.dumps(metadata.version("onnx")))
"""
    assert told_by_ours(use) == "9.9"


def test_a_missing_package_has_no_version(told_by_ours):
    use = """
import importlib.metadata as metadata
try: metadata.version("no-such-package")
except metadata.PackageNotFoundError as error: print(json.dumps(error.name))
"""
    assert told_by_ours(use) == "no-such-package"


def test_threads_that_use_what_was_put_off_wait_for_it(told_by_ours):
    use = """
import threading, pickle
found, start = [], threading.Barrier(4)
def use():
    start.wait()
    found.append(pickle.loads(pickle.dumps(5)))
threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found))
"""
    assert told_by_ours(use) == [5] * 4


def test_afterwards_garbage_is_collected_and_imports_are_found_as_ever(told_by_ours):
    code = "print(json.dumps([collecting, gc.isenabled(), gc.get_freeze_count() > 0, len(sys.meta_path) == finders]))"
    assert told_by_ours(code) == [False, True, True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the size of the process, and limits it")
def test_numpy_is_not_imported_where_openblas_would_end_the_process():
    """It takes 32 MiB at once when it is loaded, after the libraries."""
    code = """
import resource
from lora_export.cli import startup
startup.take_process()
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (70 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
told = ""
with startup.brisk():
    try:
        import numpy
    except MemoryError as error:
        told = str(error)
print(json.dumps(told))
"""
    assert told_by(code) == f"NumPy takes {startup.NUMPY_BYTES:,} bytes of addresses"


def test_full_collections_are_rare_and_others_as_ever(told_by_ours):
    before, after = told_by_ours("print(json.dumps([thresholds, gc.get_threshold()]))")
    assert after == [*before[:2], startup.BETWEEN_FULL_COLLECTIONS] and after[2] > before[2]


def test_the_first_stage_ends_the_scans_of_modules():
    code = """
from lora_export.callbacks import Progress
from lora_export.cli import progress, startup
frozen = []
for take in (lambda: None, startup.take_process):
    take()
    with progress.shown() as show:
        frozen.append(gc.get_freeze_count())
        for stage in ("one", "two"):
            show(Progress(stage))
            frozen.append(gc.get_freeze_count())
print(json.dumps(frozen))
"""
    *others, before, first, second = told_by(code)
    assert others == [0, 0, 0] and before == 0 and first >= second > 1000


OF_OURS = """
import atexit, os, sys, types
{before}
from lora_export.cli import startup
startup.take_process()
atexit.register(print, "at the end", flush=True)
sys.modules["users"] = users = types.ModuleType("users")
exec({users!r}, vars(users))
del users
{known}
print("answer")
sys.exit(3)
"""
USERS = """
class Freed:
    def __del__(self, write=__import__("os").write): write(1, b"freed")
kept = Freed()
"""


ENDED = "startup.end_with(3)"
USER_CODE = "from lora_export.user_code import find_function; find_function('os', 'getcwd')"


@pytest.mark.parametrize(
    ("program", "before", "known", "printed"),
    [
        ("lora-export", "", ENDED, "answer\nat the end\n"),
        ("lora-export", "", "", "answer\nat the end\nfreed"),
        ("lora-export", "atexit.register(print, 'first', flush=True)", ENDED, "answer\nat the end\nfirst\nfreed"),
        ("lora-export", USER_CODE, ENDED, "answer\nat the end\nfreed"),
        ("script.py", "", ENDED, "answer\nat the end\nfreed"),
    ],
)
def test_a_process_of_ours_ends_without_freeing_its_objects(tmp_path, program, before, known, printed):
    path = tmp_path / program
    path.write_text(OF_OURS.format(before=before, known=known, users=USERS))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, env=environment)
    assert (child.returncode, child.stdout, child.stderr) == (3, printed, "")


def test_a_script_that_calls_main_ends_with_its_own_exit_code():
    code = "from lora_export.cli import main\ntry: main()\nexcept SystemExit: pass\nraise SystemExit(7)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert child.returncode == 7 and b"Usage" in child.stderr


def test_a_callers_process_is_left_alone(monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    found, frozen = list(sys.meta_path), gc.get_freeze_count()
    with startup.brisk():
        assert gc.isenabled() and sys.meta_path == found
    assert gc.get_freeze_count() == frozen and "OPENBLAS_NUM_THREADS" not in os.environ


# What a merge never uses: modules, and parts of packages with all that is in them.
UNUSED = (
    *("argparse", "filelock", "onnxruntime", "pickletools", "rich.console", "sympy.", "tarfile", "torch"),
    "transformers",
    *(f"lora_export.{module}" for module in ("adapters.", "models", "options.commands", "options.train", "runtime.")),
    *(f"lora_export.api.{module}" for module in ("load_model", "merge_pipeline", "shared_head")),
    *("lora_export.names.llama_cpp", "lora_export.options.proof", "lora_export.options.unmerge"),
    *(f"lora_export.artifacts.{module}" for module in ("archive", "artifact")),
    *("lora_export.names.diffusion_layouts", "lora_export.plan.converted_attempts"),
    *(f"lora_export.pairs.{module}" for module in ("computed", "stages", "structured", "transforms")),
    *(f"lora_export.storage.{module}" for module in ("gguf_", "object_store", "signature", "store_file")),
    *(f"lora_export.storage.{module}" for module in ("distributed_checkpoint", "store_output", "torch_pickle")),
    *(f"lora_export.weights.{module}" for module in ("calibrated", "encoded_tensor", "gguf.base", "kept_weights")),
    *(f"lora_export.weights.{module}" for module in ("quantisation_loss", "quantised_layers", "residuals")),
    *(f"lora_export.weights.quantised.{module}" for module in ("codes", "new_grid", "reading", "stored_parts")),
    *(f"lora_export.formats.{module}" for module in ("comfyui", "dcp", "diffusers", "gguf", "kohya", "litgpt", "mlx")),
    *(f"lora_export.formats.{module}" for module in ("lora", "megatron", "openvino", "peft_kinds", "peft_writing")),
    *(f"lora_export.formats.{module}" for module in ("contract", "program_adapter", "torchtune", "writing")),
)
UNUSED_FOR = {
    "base.onnx": (
        *("selectors", "google.protobuf.internal.decoder", "lora_export.api.merge_base"),
        *(
            f"lora_export.graph.{module}"
            for module in ("content_match", "merge.requantise", "names_in_base", "quantised.")
        ),
        *("lora_export.weights.checkpoint", "lora_export.weights.merge.", "lora_export.weights.quantised."),
    ),
    "base.safetensors": (
        *("accelerate", "email", "google.", "html", "lora_export.graph", "onnx", "packaging", "random", "socket"),
    ),
}


@pytest.mark.parametrize("name", UNUSED_FOR)
def test_a_merge_loads_nothing_that_it_does_not_use(name, tmp_path):
    base = tmp_path / name
    if base.suffix == ".onnx":
        graph_file(base, {"fc.weight": np.zeros((3, 2), np.float32)})
    else:
        base_file(base, {"fc.weight": np.zeros((2, 3), np.float32)})
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    out = base.with_stem("out")
    line = ["lora-export", "merge", str(base), str(tmp_path / "adapter"), "-o", str(out)]
    code = f"""
sys.argv, sys.modules["__main__"].__file__ = {line}, "lora-export"
from lora_export.cli import main
try:
    main()
except SystemExit as end:
    from lora_export.cli.startup import DEFERRED
    loaded = [name for name in sys.modules if name.startswith({UNUSED + UNUSED_FOR[name]})]
    met = DEFERRED & sys.modules.keys()
    waiting = [name for name in met if "__getattr__" in vars(sys.modules[name])]
    loaded += [name for name in met if name not in waiting]
    assert met == DEFERRED or {base.suffix!r} != ".onnx"
    from lora_export.names.table import read_table
    assert not read_table.cache_info().misses  # no config, no class of transformers
    print(json.dumps([end.code, loaded, os.environ["OPENBLAS_NUM_THREADS"]]))
"""
    assert told_by(code) == [0, [], "1"]
    assert out.exists()


def test_a_merge_within_another_program_takes_nothing_of_it(tmp_path):
    base_file(tmp_path / "base.safetensors", {"fc.weight": np.zeros((2, 3), ml_dtypes.bfloat16)})
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    frozen = gc.get_freeze_count()
    line = [
        "merge",
        str(tmp_path / "base.safetensors"),
        str(tmp_path / "adapter"),
        "-o",
        str(tmp_path / "o.safetensors"),
    ]
    assert cli.run(line) == 0
    assert gc.get_freeze_count() <= frozen and gc.isenabled()  # objects that were frozen before may have gone
