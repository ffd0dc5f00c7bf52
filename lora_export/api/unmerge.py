"""`lora_export.unmerge`: the base again, bit for bit, from a merged checkpoint and what the merge kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

from lora_export import plan
from lora_export.adapters.combine import combine_in_plan
from lora_export.api.load import adapter_paths, load_adapters, locate_adapters, no_adapter_as_model
from lora_export.artifacts.files import with_suffix
from lora_export.artifacts.kind import artifact_kind
from lora_export.callbacks import in_bytes
from lora_export.errors import InputRefused, WrongUsage
from lora_export.lora import Adapter
from lora_export.options.combining import Combination, TiedEmbeddings
from lora_export.options.declaring import takes
from lora_export.options.reading import ReadOptions
from lora_export.options.unmerge import UnmergeOptions
from lora_export.plan import Plan
from lora_export.storage import atomic_output, input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hub_cache import locate
from lora_export.storage.store_path import newly_opened, place
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.residuals.archive import Residual, open_residual
from lora_export.weights.residuals.restoring import base_of, restore_base
from lora_export.weights.tied_tensors import ties_of


@dataclass(frozen=True)
class UnmergeResult:
    """What was written. Every file of it has the hash that the base had."""

    output: Path
    bytes: int  # of weights
    restored: int  # tensors that the merge had changed
    files: int  # weight files


@takes(UnmergeOptions)
def unmerge(options: UnmergeOptions) -> UnmergeResult:
    """Make the base of a merge again, bit for bit.

    `merged` is the folder or .safetensors file that `merge` wrote with `keep_residual`, unchanged; `base_from` is that
    residual. `adapters` are the adapters of that merge, the same files; their names and order do not matter. They may
    be left out (an empty list) where the merge only replaced tensors or rescaled all weights by DoRA. Weights, config
    and all other files that the merge carried over are restored. Needs no PyTorch. Memory is a few blocks.

    Raises InputRefused for a residual of another merge, other or missing adapters, merged weights that changed since,
    and where the result would differ from the base, by the hash of each file; OutputFailed where the output cannot be
    written. Nothing is left behind then.
    """
    merged = locate(options.merged, options.on_message, options.download)
    adapters = locate_adapters(options.adapters, options.on_message, options.download)
    base_from = newly_opened(options.base_from)
    input_files.must_exist(merged, "merged model")
    input_files.must_exist(base_from, "residual")
    target = (
        with_suffix(options.output, ".safetensors")
        if artifact_kind(merged) is ArtifactKind.WEIGHTS
        else place(options.output)
    )
    with no_adapter_as_model(merged, adapters), open_residual(base_from) as residual:
        if residual.facts.get("is_folder") is not merged.is_dir():
            what = "a folder" if residual.facts.get("is_folder") else "one .safetensors file"
            raise InputRefused(f"{base_from} was kept by a merge into {what}, and {merged} is another kind")
        base = base_of(residual, merged)
        settings = _PlanSettings.of(residual)
        loaded = load_adapters(
            adapters,
            reading=replace(settings.reading, allow_pickle=options.allow_pickle, base_config=merged),
            of_models=True,
        )
        steps = _plan(residual, _in_order(residual, loaded), base, settings)
        size = sum(spec.nbytes for spec in base.specs)
        inputs, is_file = [merged, base_from, *adapter_paths(adapters)], not merged.is_dir()
        with atomic_output.staged(options, target, inputs, size, is_file=is_file) as folder:
            progress = in_bytes(options.on_progress, "restoring", size)
            restore_base(residual, steps, base, merged, folder, file_name=target.name, progress=progress)
        restored = sum(len(facts["changed"]) for facts in residual.facts["shards"].values())
        return UnmergeResult(target, size, restored, len(base.shards))


def _in_order(residual: Residual, loaded: Sequence[Adapter]) -> list[Adapter]:
    """The adapters in the order of the merge, with their names there. Raises InputRefused where one is missing."""
    by_hash = {adapter.sha256: adapter for adapter in loaded}
    recorded = residual.facts["adapters"]
    if not all(map(_is_record, recorded)):
        raise InputRefused(f"{residual.path} is damaged: its facts on the adapters are no records of a merge")
    missing = [f"{one['name']} (sha256 {str(one['sha256'])[:12]})" for one in recorded if one["sha256"] not in by_hash]
    if missing:
        raise InputRefused(
            f"{residual.path} needs the adapters of its merge: {', '.join(missing)} is not given. Give the same files"
        )
    known = {one["sha256"] for one in recorded}
    if recorded and (others := [adapter.name for adapter in loaded if adapter.sha256 not in known]):
        raise InputRefused(f"{', '.join(others)} was not in the merge that {residual.path} belongs to")
    return [replace(by_hash[one["sha256"]], name=str(one["name"])) for one in recorded]


def _is_record(one: object) -> bool:
    """Whether this is what the facts have of an adapter."""
    return (
        isinstance(one, dict)
        and "name" in one
        and isinstance(one.get("sha256"), str)
        and isinstance(one.get("weight"), int | float)
    )


@dataclass(frozen=True)
class _PlanSettings:
    """The options of the merge that its plan depends on."""

    layout: dict[str, str]
    prefixes: dict[str, str]
    reading: ReadOptions
    combination: Combination
    tied: TiedEmbeddings

    @classmethod
    def of(cls, residual: Residual) -> _PlanSettings:
        """Those that the residual records. Raises InputRefused for what is none."""
        try:
            layout, prefixes, reading, chosen, tied = (residual.facts["settings"][field.name] for field in fields(cls))
            found = cls(dict(layout), dict(prefixes), ReadOptions(**reading), Combination(**chosen), tied)
            is_known = tied in get_args(TiedEmbeddings) and {*found.layout.values()} <= {"in_out", "out_in"}
            if not is_known or not {*map(type, found.prefixes.values())} <= {str}:
                raise ValueError("a layout, a prefix or a way to handle ties that no merge has")
            return found
        except (AttributeError, KeyError, TypeError, ValueError, WrongUsage) as error:
            raise InputRefused(f"{residual.path} is damaged: its settings are not those of a merge") from error


def _plan(residual: Residual, adapters: Sequence[Adapter], base: Checkpoint, settings: _PlanSettings) -> Plan | None:
    """The plan of the merge; None where nothing of it is subtracted."""
    if not adapters:
        return None
    weights = [one["weight"] for one in residual.facts["adapters"]]
    renamed = load_adapters(adapters, settings.prefixes, of_models=True)
    apart = residual.facts.get("apart")
    names = frozenset(map(str, apart)) if isinstance(apart, list) else frozenset()
    steps = plan.make(
        renamed,
        base.specs,
        strengths=weights,
        may_add=True,
        layout=settings.layout,
        rules=base.rules,
        # Merged tables show nothing of the base's. The residual has the rows of a table that is stored again.
        ties=replace(ties_of(base, settings.tied), stored=frozenset(), apart=names),
    )
    return combine_in_plan(steps, settings.combination)
