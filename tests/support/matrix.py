"""The matrix of architectures: what becomes of each small model with an adapter, and of the same with other tools.

Each exporter gets the same base and the same adapter. `verify` judges all graphs, ours and those of others, against
PyTorch with the adapter attached.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import peft
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_export as le
from lora_export.errors import LoraExportError
from lora_export.models.load import load_model
from support.exporters import export_by_optimum
from support.genai import build_genai_graph
from support.model_folders import MODEL_FOLDERS, saved_module
from support.more_models import MORE_MODELS
from support.small_models import MODELS, words_tokenizer

EVERY_MODEL = MODELS | MORE_MODELS
NAMES = (*EVERY_MODEL, *MODEL_FOLDERS)
MODES = ("merged", "nodes")
TRANSFORMERS, OPTIMUM, GENAI = "transformers' exporter", "optimum-onnx", "genai builder"
PROGRAM = "program (`.pt2`)"
COLUMNS = ("pairs", *MODES, PROGRAM, TRANSFORMERS, OPTIMUM, GENAI)
SAME, NOT_RUN = "same", "-"
SHOWN_WORDS = 6  # of a refusal

# Modules that get no adapter, and why.
LEFT_OUT = {
    "blip": (r"cls\.predictions", "tied to the table of words"),
    "wav2vec2": ("lm_head", "PEFT fails on it"),
    "hubert": ("lm_head", "PEFT fails on it"),
    "mamba": ("out_proj", "PEFT refuses it"),
    "detr": (r"decoder\.layers\.0\.self_attn", "its values are zeros"),
    "vjepa2": (r"predictor\.layer\.0\.attention\.(query|key)", "its tokens are all equal"),
    "sam": (r"output_hypernetworks_mlps\.0", "only a single mask needs it"),
}
# Models whose images the exporter refuses: the graph takes texts alone, and no adapter is on the tower of images.
TOWERS = r"visual|vision|multi_modal_projector"
TEXTS_ALONE = {"llava", "llava_next", "pixtral", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
# What no graph of ours has: see tests/README.md for the reasons.
REFUSED = {"canine", "mamba"}
GENAI_BUILDS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "granite"}
GENAI_BUILDS |= {"smollm3", "gpt_oss", "opt"}


@dataclass(frozen=True)
class Subject:
    """A small model, and an adapter that PEFT saved for it, as folders."""

    name: str
    base: Path
    adapter: Path
    pairs: int


def subject(name: str, folder: Path) -> Subject:
    """All linear layers have a pair, but for the head over the words; in networks of convolutions these have one."""
    torch.manual_seed(0)
    with _quiet():
        if name in MODEL_FOLDERS:
            module: Any = saved_module(name, folder / "base")
        else:
            architecture, config = EVERY_MODEL[name]
            cls = getattr(hf, architecture)
            cls(config()).save_pretrained(folder / "base")
            module = cls.from_pretrained(folder / "base")
        targets = _targets(name, module)
        options = peft.LoraConfig(
            target_modules=targets, r=4, lora_alpha=8, init_lora_weights=False,
            fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
        )  # fmt: skip
        torch.manual_seed(1)
        peft.get_peft_model(module, options).save_pretrained(folder / "adapter")
    return Subject(name, folder / "base", folder / "adapter", len(targets))


def _targets(name: str, module: Any) -> list[str]:
    head = getattr(module, "get_output_embeddings", lambda: None)()
    pattern = LEFT_OUT.get(name, ("$^", ""))[0]
    pattern += f"|{TOWERS}" if name in TEXTS_ALONE else ""
    for kinds in ((nn.Linear, Conv1D), (nn.Linear, nn.Conv1d, nn.Conv2d)):
        found = [path for path, part in module.named_modules() if isinstance(part, kinds) and part is not head]
        found = [path for path in found if not re.search(pattern, path)]
        if len(found) >= 4:
            return found
    raise AssertionError(f"{name} has hardly any layers")


def row(name: str, folder: Path) -> dict[str, str]:
    """A row of the table: verdicts and seconds, of our modes and of the other tools where they build the model."""
    made = subject(name, folder)
    cells = {"pairs": str(made.pairs)}
    cells |= {mode: cell(lambda mode=mode: export(made, mode, folder)) for mode in MODES}
    cells[PROGRAM] = cell(lambda: program(made, folder))
    cells[TRANSFORMERS] = NOT_RUN if name in MODEL_FOLDERS else cell(lambda: by_transformers(made, folder))
    has_optimum = name not in MODEL_FOLDERS and "OPTIMUM_PYTHON" in os.environ
    cells[OPTIMUM] = cell(lambda: by_optimum(made, folder)) if has_optimum else NOT_RUN
    has_builder = name in GENAI_BUILDS and importlib.util.find_spec("onnxruntime_genai") is not None
    cells[GENAI] = cell(lambda: by_genai(made, folder)) if has_builder else NOT_RUN
    return cells


def cell(run: Callable[[], str]) -> str:
    began = _processor_seconds()
    what = run()
    return f"{what}, {_processor_seconds() - began:.1f} s"


def _processor_seconds() -> float:
    """Of this process and its children: unlike the clock's, they do not depend on what else runs."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def without_seconds(cells: dict[str, str]) -> dict[str, str]:
    return {column: re.sub(r", [\d.]+ s$", "", text) for column, text in cells.items()}


def export(made: Subject, mode: str, folder: Path) -> str:
    """`same`, or in what way it is refused."""
    try:
        result = le.export_onnx(made.base, folder / f"{mode}.onnx", adapters=made.adapter, lora=mode)
    except LoraExportError as error:
        return f"{type(error).__name__}: {_short(error)}"
    assert result.proof is not None and result.proof.verdict.same
    return SAME + (" (texts alone)" if made.name in TEXTS_ALONE else "")


def program(made: Subject, folder: Path) -> str:
    """A program of torch.export, written by us and read by `verify`, which does not use `torch.export.load`."""
    try:
        path = le.export_torchscript(made.base, folder / "m.pt2", adapters=made.adapter, verify=False).output
    except LoraExportError as error:
        return f"refused: {_short(error)}"
    return _judged(path, made)


def by_transformers(made: Subject, folder: Path) -> str:
    """PEFT's merge, exported by transformers' own exporter with its own optimisation, and judged by `verify`."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = load_model(str(made.base))
    if made.name in TEXTS_ALONE:
        assert model.text_only is not None
        model = model.text_only
    inputs = model.example_inputs()
    dynamic = {name: dict.fromkeys(model.axes[name], torch.export.Dim.DYNAMIC) for name in inputs}
    path = folder / "transformers.onnx"
    try:
        with _quiet():
            merged = peft.PeftModel.from_pretrained(model.module, str(made.adapter)).merge_and_unload().eval()
            exported = OnnxExporter().export(
                merged, {**inputs, "use_cache": False}, config=OnnxConfig(dynamic_shapes=dynamic)
            )
            ir.save(exported.program, path)
    except Exception as error:  # noqa: BLE001  whatever it refuses a model with
        return f"refused: {_short(error)}"
    return _judged(path, made)


def by_genai(made: Subject, folder: Path) -> str:
    """PEFT's merge, as the builder of onnxruntime-genai exports it."""
    merged = _merged_by_peft(made, folder / "peft")
    words_tokenizer(merged)
    try:
        return _judged(build_genai_graph(merged, folder / "genai", "fp32"), made)
    except Exception as error:  # noqa: BLE001  whatever it refuses a model with
        return _refusal(error)


def by_optimum(made: Subject, folder: Path) -> str:
    """PEFT's merge, as optimum-onnx exports it, by the task that it finds in the config."""
    merged, target = _merged_by_peft(made, folder / "peft"), folder / "optimum"
    try:
        export_by_optimum(merged, target)
    except Exception as error:  # noqa: BLE001  whatever it refuses a model with
        return _refusal(error)
    graphs = sorted(target.glob("*.onnx"))
    return _judged(graphs[0] if len(graphs) == 1 else target, made)


def _merged_by_peft(made: Subject, folder: Path) -> Path:
    if not folder.exists():
        with _quiet():
            base = getattr(hf, EVERY_MODEL[made.name][0]).from_pretrained(made.base)
            merged = peft.PeftModel.from_pretrained(base, str(made.adapter)).merge_and_unload()
            merged.save_pretrained(folder)
    return folder


def _refusal(error: Exception) -> str:
    """Of another tool, which may run in a process of its own: the last line there."""
    lines = getattr(error, "stderr", b"").decode().strip().splitlines()
    return f"refused: {_first_words(lines[-1]) if lines else _short(error)}"


def _judged(path: Path, made: Subject) -> str:
    try:
        result = le.verify(path, made.base, adapters=made.adapter)
    except LoraExportError as error:
        return f"not judged: {_short(error)}"
    if result.proof is None:
        return "not judged"
    verdict = result.proof.verdict
    lacking = {reason.output for reason in verdict.reasons if reason.text == "the candidate lacks this output"}
    if lacking and all(reason.output in lacking for reason in verdict.reasons):
        what = next(iter(lacking)) if len(lacking) == 1 else f"{len(lacking)} outputs"
        return f"{SAME} (without {what})"
    return str(verdict.outcome)


def _short(error: BaseException) -> str:
    return _first_words((str(error).strip() or type(error).__name__).splitlines()[0])


def _first_words(line: str) -> str:
    words = re.sub(r"[|<>]|/\S+/", "", line).split()
    return " ".join(words[:SHOWN_WORDS]) + (" ..." if len(words) > SHOWN_WORDS else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    disabled, bars = logging.root.manager.disable, hf.utils.logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    hf.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        if bars:
            hf.utils.logging.enable_progress_bar()
