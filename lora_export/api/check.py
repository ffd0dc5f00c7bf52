"""`lora_export.check`: what runtimes will refuse, drop or run at another strength, before they are started."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export import plan
from lora_export.api.adapter_names import repeated_tables, with_shapes_of_base
from lora_export.api.load import adapter_paths, load_adapters, locate_adapters, no_adapter_as_model
from lora_export.artifacts.artifact import open_artifact
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats import onnx_adapter
from lora_export.formats.gguf import GGUF_ROWS
from lora_export.lora import Adapter
from lora_export.options.adapters import CheckOptions
from lora_export.options.combining import AdapterSource
from lora_export.options.declaring import takes
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named
from lora_export.preflight.facts import Base, facts_of_adapter, facts_of_base, facts_of_changes, peft_config
from lora_export.preflight.rules import RuntimeOutcome, findings_of, runtime_named
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hub_cache import locate
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.merge import refuse_broken_tie
from lora_export.weights.pipeline import is_pipeline
from lora_export.weights.tied_tensors import ties_of


@dataclass(frozen=True)
class CheckResult:
    """What each runtime does with an adapter. True where all of them run it as it was trained."""

    adapter: str
    outcomes: tuple[RuntimeOutcome, ...]

    def __bool__(self) -> bool:
        return not any(outcome.findings for outcome in self.outcomes)


@takes(CheckOptions)
def check(options: CheckOptions) -> CheckResult:
    """Compare an adapter with the rules of runtimes: what each will refuse, drop or run at another strength.

    Runs nothing and needs no PyTorch. Reads the adapter, and the headers of `base`; where the adapter has rows of a
    tied table that `base` stores twice, both tables. Every finding has the version and the file in which its rule was
    read, and what repairs it. Without `base`, an outcome names the facts that are not known. `settings` are what the
    runtime is started with: {"max-lora-rank": 64}.

    Raises InputRefused where the adapter cannot be read or does not fit the base, and WrongUsage for an unknown runtime
    or a setting that none of them has.
    """
    runtimes = [runtime_named(name) for name in dict.fromkeys(options.runtimes)]
    known = {setting for runtime in runtimes for setting in runtime.settings}
    if unknown := sorted(options.settings.keys() - known):
        names = ", ".join(sorted(known)) or "no setting"
        raise WrongUsage(f"{named('settings')} has {', '.join(unknown)}; these runtimes have {names}")
    (source,) = locate_adapters(options.adapter, ignore, options.download)
    path = None if options.base is None else locate(options.base, ignore, options.download)
    adapter = _loaded(source, options.reading.for_base(path))
    folder = next(iter(adapter_paths(source)), None)
    with no_adapter_as_model(path, source):
        adapter, base = (adapter, None) if path is None else _opened(path, adapter)
    config = peft_config(adapter, folder)
    facts = {**facts_of_adapter(adapter, config, folder, base), **facts_of_base(adapter, base)}
    changes = facts_of_changes(adapter, config, base)
    paths = {"ADAPTER": str(folder or adapter.name)} | ({} if path is None else {"BASE": str(path)})
    outcomes = (findings_of(runtime, facts, changes, options.settings, paths, base=base) for runtime in runtimes)
    return CheckResult(adapter.name, tuple(outcomes))


def _loaded(source: AdapterSource, reading: ReadOptions) -> Adapter:
    """The adapter. Of an .onnx_adapter only the file itself is read: its graph has the names."""
    paths = adapter_paths(source)
    if paths and open_artifact(paths[0]).kind is ArtifactKind.ADAPTER:
        onnx_adapter.read(paths[0])
        return Adapter(name=paths[0].stem, format="onnx_adapter", pairs={})
    (adapter,) = load_adapters(source, reading=reading, of_models=True)
    return adapter


def _opened(path: Path, adapter: Adapter) -> tuple[Adapter, Base]:
    """The base, and the adapter with its shapes where its own file does not record them. The adapter has to fit.

    Of a pipeline and of the graph of an .onnx_adapter nothing is known that a rule depends on.
    """
    if is_pipeline(path) or adapter.format == "onnx_adapter":
        return adapter, Base()
    artifact = open_artifact(path)
    checkpoint, ties = artifact.headers, None
    is_gguf = artifact.kind is ArtifactKind.GGUF
    adapter = adapter if is_gguf else with_shapes_of_base(adapter, path)
    with contextlib.suppress(InputRefused):  # which tensors are tied is not known
        ties = _ties(checkpoint, plan.Tied.BOTH)
    handling = _least_handling(adapter, checkpoint, ties)
    copies = {} if ties is None else ties.tensors
    model_type = checkpoint.config.get("model_type")
    has_gguf = is_gguf or (isinstance(model_type, str) and model_type in GGUF_ROWS)
    return adapter, Base(
        config=checkpoint.config,
        tensors=frozenset([*(spec.name for spec in checkpoint.specs), *copies]),
        tied=None if ties is None else bool(copies),
        repeated=frozenset(repeated_tables(adapter, checkpoint, copies)),
        merging=_merging(handling, checkpoint, is_gguf=is_gguf),
        file=path.name if is_gguf else "",
        instead={} if has_gguf else {"gguf": "merge"},
    )


def _merging(handling: plan.Tied | None, checkpoint: Checkpoint, *, is_gguf: bool) -> dict[str, Any]:
    """The options without which a merge into this base is refused. A GGUF file needs none to stay quantised."""
    return ({"tied": handling.value} if handling is plan.Tied.UNTIE else {}) | (
        {"keep_quantised": True} if checkpoint.quantised and not is_gguf else {}
    )


def _least_handling(adapter: Adapter, checkpoint: Checkpoint, both: plan.Ties | None) -> plan.Tied | None:
    """What a merge has to do with tied tensors of the base, so that the adapter fits. None where no ties are known.

    Raises InputRefused for an adapter that fits in no way.
    """
    how: dict[str, Any] = {"rules": checkpoint.rules, "identity_ok": True, "unknown_layout_ok": True}
    for handling in () if both is None else (plan.Tied.ERROR, plan.Tied.UNTIE):
        may_add = checkpoint.takes_more or handling is plan.Tied.UNTIE  # which is for the checkpoint of a GGUF file
        with contextlib.suppress(InputRefused):
            ties = _ties(checkpoint, handling)
            laid = plan.make([adapter], checkpoint.specs, ties=ties, may_add=may_add, **how)
            if handling is plan.Tied.ERROR:
                refuse_broken_tie(laid, checkpoint)
            return handling
    plan.make([adapter], checkpoint.specs, ties=both, may_add=True, **how)
    return None if both is None else plan.Tied.BOTH


def _ties(checkpoint: Checkpoint, handling: plan.Tied) -> plan.Ties:
    """The ties of a base. Two tables that it stores are compared for rows of one alone, and else taken for equal."""
    ties = ties_of(checkpoint, handling)
    return ties if handling is plan.Tied.ERROR else replace(ties, has_other_values=lambda _: False)
