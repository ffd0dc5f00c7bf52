"""`lora_export.inspect`: what an adapter, a checkpoint, a graph or a program contains. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import formats
from lora_export.api.load import with_notes_on_statements
from lora_export.artifacts.artifact import WrittenRecord, has_broken_archive, open_artifact
from lora_export.artifacts.executorch_file import ProgramMethod, read_methods
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused, WrongUsage, brief, listed
from lora_export.formats import task_adapters
from lora_export.lora import Adapter
from lora_export.options.adapters import InspectOptions
from lora_export.options.declaring import takes
from lora_export.options.spelling import named
from lora_export.plan.diffusion import chosen_component
from lora_export.provenance import adapter_records
from lora_export.runtime.expectations import recorded_base, refuse_unexpected
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hub_cache import locate
from lora_export.storage.manifest import damage
from lora_export.storage.signature import refuse_unsigned
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from lora_export.formats.onnx_adapter import OnnxAdapter
    from lora_export.graph.find_sites import Sites
    from lora_export.graph.interface import Interface
    from lora_export.graph.site import Site


@dataclass(frozen=True)
class ContainedAdapter:
    """An adapter that a file records: merged into it, beside its weights, or for its inputs."""

    name: str
    sha256: str = ""
    weight: float | None = None  # the factor on its scale
    id: int | None = None  # what `adapter_ids` selects it by, in a graph whose rows choose


@dataclass(frozen=True)
class Inspection:
    """What a path contains: exactly one of the first five is not None."""

    path: Path
    adapter: Adapter | None = None
    checkpoint: Checkpoint | None = None  # names, shapes and types; no weights
    graph: Sites | None = None  # where the weights of a graph are read, and how each name was recovered
    onnx_adapter: OnnxAdapter | None = None
    methods: tuple[ProgramMethod, ...] | None = None  # of a program of ExecuTorch
    interface: Interface | None = None  # of a graph: inputs, outputs and operator sets
    record: WrittenRecord = field(default_factory=WrittenRecord)  # how the file was made; False where that is unknown

    def __repr__(self) -> str:
        parts = {one.name: getattr(self, one.name) for one in fields(self)[1:]} | {"record": self.record or None}
        return brief(
            self, repr(str(self.path)), *(f"{name}={value!r}" for name, value in parts.items() if value is not None)
        )

    @property
    def adapter_bytes(self) -> int:
        """The size of an adapter's files."""
        return sum(path.stat().st_size for path in input_files.files_of(self.path)) if self.adapter else 0

    @property
    def mode(self) -> str:
        """How the adapters are in a graph, as `lora` of `export_onnx` names it; empty where none are recorded."""
        return self.record.mode if self.record.adapters or self.record.by_row is not None else ""

    @property
    def adapters(self) -> tuple[ContainedAdapter, ...]:
        """The adapters that the file records, in the order of their ids."""
        recorded, names = self.record.adapters, self.record.by_row or ()
        first = len(recorded) - len(names)
        return tuple(
            ContainedAdapter(
                str(adapter.get("name", "")),
                str(adapter.get("sha256", "")),
                weight if isinstance(weight := adapter.get("weight"), int | float) else None,
                number - first + 1 if names and number >= first else None,
            )
            for number, adapter in enumerate(recorded)
        )

    @property
    def verdict(self) -> Mapping[str, Any]:
        """The verdict that the file was published with; empty where none is recorded."""
        value = self.record.content.get("verdict")
        return value if isinstance(value, Mapping) else {}

    @property
    def has_damaged_record(self) -> bool:
        """Whether what is behind a program was a record, and can no longer be read."""
        return self.methods is not None and has_broken_archive(self.path)

    @property
    def linear(self) -> tuple[Site, ...]:
        """The linear layers and convolutions of a graph, without those that multiply by an adapter's A or B."""
        if self.graph is None:
            return ()
        from lora_export.graph.interface import is_adapter_tensor

        return tuple(site for site in (*self.graph.linear, *self.graph.unnamed) if not is_adapter_tensor(site))


@takes(InspectOptions)
def inspect(options: InspectOptions) -> Inspection:
    """Read the headers of a path, and the tensors of an adapter.

    `path` is an adapter, a Hugging Face folder, a .safetensors file, an .onnx, an .onnx_adapter or a .pte.
    Of a graph, the inputs and outputs are read, too, and of what lora-export wrote the record: adapters, base, verdict.

    `expected` is compared with an adapter, or with the adapters and the base that a file records. Raises Different
    where they are others, and Undecided where the file records no such value.

    Statements of `reading` without an effect are notes: defaults of all commands may contain them.

    Raises InputRefused where the path is missing, damaged or of an unknown kind, or where `check` finds a difference.
    """
    found = _inspect(path := locate(options.path, ignore, options.download), options)
    if options.expected.signature is not None:
        refuse_unsigned(path, options.expected.signature)
    if options.expected:
        own = found.adapter
        adapters = found.record.adapters if own is None else adapter_records([own], [1.0])
        refuse_unexpected(path, options.expected, adapters, recorded_base(found.record.base))
    return found


def _inspect(path: Path, options: InspectOptions) -> Inspection:
    if not path.exists():
        input_files.refuse_broken_link(path)
        raise InputRefused(f"there is nothing at {path}{input_files.similar_name(path)}")
    artifact = open_artifact(path)
    if artifact.kind.is_graph:
        artifact.refuse_changed_weights()
    if options.checkpoint is not None and artifact.kind is not ArtifactKind.GRAPH:
        raise WrongUsage(f"{named('checkpoint')} names the weights of an .onnx file")
    if options.check:
        if damaged := damage(path):
            raise InputRefused(f"{path} is not what was written:", listed(damaged))
        options.on_message(f"note: every file that the record of {path} names is what was written")
    is_model = artifact.kind.is_checkpoint and not options.reading.stored_adapter and task_adapters.recognises(path)
    if formats.recognised(own := formats.located(path)) and not is_model:
        adapter = formats.load(path, options=options.reading, activated=True)
        (adapter,) = with_notes_on_statements([adapter], options.reading)
        return Inspection(own, adapter=chosen_component(adapter, options.reading.component))
    if unused := [named(name) for name in options.reading.chosen() if name != "allow_pickle"]:
        are = "is" if len(unused) == 1 else "are"
        kind = "a checkpoint" if artifact.kind.is_checkpoint else "another file"
        kind = "a graph" if artifact.kind.is_graph else kind
        options.on_message(f"note: {' and '.join(unused)} {are} about adapters, and {path} is {kind}")
    if artifact.kind is ArtifactKind.ADAPTER:
        from lora_export.formats import onnx_adapter

        return Inspection(path, onnx_adapter=onnx_adapter.read(path))
    if artifact.kind is ArtifactKind.GRAPH:
        from lora_export.graph.find_sites import find_sites
        from lora_export.graph.interface import read_interface
        from lora_export.graph.onnx_file.reading import load_graph

        names = None
        if options.checkpoint is not None:
            names = open_checkpoint(locate(options.checkpoint, ignore, options.download))
        model = load_graph(artifact.path)
        return Inspection(path, graph=find_sites(model, names), interface=read_interface(model), record=artifact.record)
    if artifact.kind is ArtifactKind.EXECUTORCH:
        return Inspection(path, methods=read_methods(path), record=artifact.record)
    if artifact.kind is ArtifactKind.OTHER and path.is_file():
        raise InputRefused(f"{path} is no adapter, checkpoint or graph in a known format")
    return Inspection(path, checkpoint=artifact.headers, record=artifact.record)
