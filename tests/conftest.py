"""What all tests share. Tests marked `cuda` are skipped, with the reason said, where CUDA does not run."""

from __future__ import annotations

import functools
import gc
import importlib.abc
import importlib.machinery
import logging.handlers
import math
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from lora_export.runtime import environment
from lora_export.runtime.environment_probes import CUDA

if TYPE_CHECKING:
    from support.page_inputs import PageInputs
    from support.programs import ProgramFiles
    from support.stores import Stored

frozen = SimpleNamespace(modules=0)  # how many modules the garbage collector no longer visits


@functools.cache
def why_no_cuda() -> str:
    return environment.try_provider(CUDA).fault


def pytest_configure() -> None:
    # A shell starts a background command with SIGINT ignored, and its children inherit that. Tests send SIGINT.
    os.environ.pop("CI", None)  # it would make `verify` strict
    # Each worker would rewrite all test files again, and each command compile the whole package.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # A flush is half of a small output's time, and no power fails. Commands in processes of their own flush.
    os.fsync = os.fstat  # type: ignore[assignment]
    # In a small model, few operators run twice with equal shapes: to keep their outputs takes more than it saves.
    os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
    tomllib.loads = functools.lru_cache(maxsize=4)(tomllib.loads)  # each command reads this folder's pyproject.toml
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.meta_path.insert(0, WithoutCompiler())


class WithoutCompiler(importlib.abc.MetaPathFinder):
    """Imports bitsandbytes, which peft needs, without PyTorch's compiler.

    It would import it for four functions that are not called on a CPU: a third of the time that peft's import takes.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != "bitsandbytes.backends.default.ops":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self.run, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    @staticmethod
    def run(own: Callable[[ModuleType], None], module: ModuleType) -> None:
        import torch

        with mock.patch.object(torch, "compile", lambda function, **_: function):
            own(module)


def pytest_collectstart() -> None:
    gc.disable()  # until all is imported: hardly any of it is garbage


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import the test files from another one on, in each worker.

    In a fresh clone, pytest rewrites the assertions of each file, and keeps the result. Workers that begin at as many
    places do each a part; side by side, each would do all.
    """
    worker = getattr(session.config, "workerinput", {"workerid": "gw0", "workercount": 1})
    folders = [Path(argument) for argument in session.config.args]
    number = int(worker["workerid"].removeprefix("gw"))
    if number and all(folder.is_dir() for folder in folders):
        gc.disable()
        paths = sorted(path for folder in folders for path in folder.rglob("test_*.py"))
        first = len(paths) * number // worker["workercount"]
        for path in paths[first:] + paths[:first]:
            _ = pytest.Module.from_parent(session, path=path.absolute()).obj


def pytest_collection_finish() -> None:
    # The garbage collector need not visit thousands of tests and all modules each time: a third of the time of exports.
    freeze_what_was_imported()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()
    if "onnxruntime" in sys.modules:
        one_thread_a_session()
    find_blas_once()


def freeze_what_was_imported() -> None:
    """The garbage collector never visits it again.

    That is also for what tests import later: accelerate collects garbage after each training, most of the time of a
    short one.
    """
    imported = len(sys.modules)
    if imported > frozen.modules + 100:
        frozen.modules = imported
        gc.collect()
        gc.freeze()


def one_thread_a_session() -> None:
    """Each session of onnxruntime would have a thread for every core, that spins while it waits: 4 times the time."""
    import onnxruntime

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    onnxruntime.SessionOptions = Options


def find_blas_once() -> None:
    """Each merge would look through all loaded libraries, some hundred in a worker: an eighth of a small one's time."""
    import threadpoolctl

    found = functools.lru_cache(maxsize=1)(lambda modules, find=threadpoolctl.ThreadpoolController: find())
    threadpoolctl.ThreadpoolController = lambda: found(len(sys.modules))  # a module may bring a library


def pytest_runtest_setup(item: pytest.Item) -> None:
    freeze_what_was_imported()
    if "peft" in sys.modules:  # each saved adapter would get a page in Markdown, half the time of saving it
        sys.modules["peft"].PeftModel.create_or_update_model_card = lambda *_: None
    if "lora_export.api.training_output" in sys.modules:
        draw_each_kind_once()
    if "lora_export.models.export" in sys.modules:
        keep_exports(item)
    if sys.platform == "linux" and "lora_export.runtime.torchscript.runner" in sys.modules:
        use_warm_children(item)
    if item.get_closest_marker("cuda") and why_no_cuda():
        pytest.skip(f"onnxruntime's CUDA provider does not run here: {why_no_cuda()}")


@functools.cache
def draw_each_kind_once() -> None:
    """A plot of losses takes a third of the time of a small training. Those of as many kinds of lines are copies."""
    from lora_export.api import training_output

    draw, drawn = training_output.draw_losses, dict[object, bytes]()

    def draw_or_copy(losses: Mapping[str, Sequence[float]], path: Path, **more: Any) -> None:
        held_out = more.get("held_out") or {}
        lines = [*losses.values(), [*held_out.values()]]
        kind = (*losses, *((min(len(line), 2), all(map(math.isfinite, line))) for line in lines))
        if kind not in drawn:
            draw(losses, path, **more)
            drawn[kind] = path.read_bytes()
        path.write_bytes(drawn[kind])

    training_output.draw_losses = draw_or_copy


def keep_exports(item: pytest.Item) -> None:
    from support import kept_exports

    kept_exports.install()
    kept_exports.use.place = kept_exports.folder(item.config)
    kept_exports.use.folder = None if item.get_closest_marker("exports") else kept_exports.use.place


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What is logged. pytest's own plugin visits all loggers six times a test, and has PyTorch write its traces."""
    handler, level = logging.handlers.BufferingHandler(sys.maxsize), logging.root.level
    known = (each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger))
    loggers = [logging.root, *(each for each in known if not each.propagate)]
    logging.root.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.buffer
    for logger in loggers:
        logger.removeHandler(handler)
    logging.root.setLevel(level)


@pytest.fixture
def by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy does the arithmetic of merges, also where the compiled one is installed."""
    from lora_export.weights import compiled

    monkeypatch.setattr(compiled, "kernel", lambda: None)


def use_warm_children(item: pytest.Item) -> None:
    from support import warm_children

    warm_children.install()
    warm_children.use.warm = item.get_closest_marker("processes") is None


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> ProgramFiles:
    """Programs of torch.export, and the adapters of their models, as files."""
    from support.programs import ProgramFiles

    return ProgramFiles(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="session")
def page_inputs(tmp_path_factory: pytest.TempPathFactory) -> PageInputs:
    """The files that README, guide and the examples in `--help` name."""
    from support.page_inputs import PageInputs

    return PageInputs(tmp_path_factory.mktemp("page-inputs"))


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small program, for the tests of its file."""
    import torch

    from support.factories import Worded
    from support.programs import export, ids, padded

    torch.manual_seed(0)
    inputs = {"ids": ids(2, 5) % 10, "mask": padded(2, 5)}
    return export(Worded(), inputs, tmp_path_factory.mktemp("good") / "good.pt2", dynamic=2)


@pytest.fixture
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """An empty bucket of a store with the interface of S3, of Google (`gs`) or of Azure (`az`)."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    kind = getattr(request, "param", os.environ.get("STORE", "s3"))
    if kind == "az":
        from support import azurite

        return azurite.StoredInAzure(monkeypatch)
    pytest.importorskip("moto.server", reason="moto is not installed")
    if kind == "gs":
        from support import google_store

        return google_store.StoredInGoogle(monkeypatch)
    from support import stores

    stores.use(monkeypatch, stores.endpoint())
    return stores.Stored()


@pytest.fixture
def small_parts(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads in parts of `stores.PART` bytes, which S3 itself would refuse."""
    from lora_export.storage import object_store
    from support import stores

    monkeypatch.setattr(object_store, "UPLOADED_PART", stores.PART)
    if models := sys.modules.get("moto.s3.models"):
        monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of processes with this one alone in it."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", action="store_true", help="write the tables that tests make into tests/README.md")
    parser.addoption("--kills", type=int, default=50, help="workers that the soak of a fleet kills")
    parser.addoption("--slot-seconds", type=float, default=300, help="how long the soak of a graph with slots runs")
    billions = "billions of parameters, of 0.15, 0.5, 1.1 and 3, that bench_scale.py measures"
    parser.addoption("--sizes", default="0.15,0.5,1.1,3", help=f"{billions}: merge and verify --base")
    parser.addoption("--loaded-sizes", default="0.15,0.5,1.1", help=f"{billions}: verify --model and onnx")
