"""The files of a folder that were judged, and other weights that a loader might take in their place.

transformers, diffusers and the runtimes that serve their folders choose among several sets of weights by their names. A
folder that is judged by one set must not have another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.artifacts.artifact import Artifact
from lora_export.artifacts.files import hashes_of
from lora_export.errors import first_of, one_line
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.manifest import OF_THE_OUTPUT
from lora_export.verification.companion_files import (
    CHAT_TEMPLATE,
    CONFIGS,
    SHOWN_FILES,
    TOKENIZER_READERS,
    VOCABULARIES,
    WEIGHT_ENDINGS,
)
from lora_export.verification.parity import Findings
from lora_export.weights.checkpoint import CONFIG, Checkpoint

# Names under which loaders look for weights in a model's folder, or for an adapter to attach.
NAMES_OF_LOADERS = re.compile(
    r"""((diffusion_)?(pytorch|flax)_model|model|tf_model|adapter_model)([.-].*)?
        \.(safetensors|bin|h5|msgpack)(\.index(\.\w+)?\.json)?
    |consolidated([.-].*)?\.(safetensors|pth|pt)
    |model\.ckpt.*
    |adapter_config\.json""",
    re.VERBOSE | re.IGNORECASE,
)
OF_TRAINERS = re.compile(r"(.*/)?(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")  # unread, too
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # of a tokenizer, among others
OTHER_FILE = "transformers_weights"  # of a config: the file that transformers loads in place of the model's
# optimum's graph with a branch for the first tokens and one for the others
MERGED_DECODER = "decoder_model_merged.onnx"


@dataclass(frozen=True)
class LoadedFiles:
    """The files of a candidate that were judged, by their names, and what was found of the others."""

    judged: Mapping[str, Path]
    others: Findings = field(default_factory=Findings)

    @property
    def hashes(self) -> dict[str, str]:
        """Name -> SHA-256 of the files that were judged."""
        return hashes_of(self.judged)


def loaded_files(candidate: Artifact, opened: Checkpoint | None = None) -> LoadedFiles:
    """The files of a candidate that a loader reads, and leftovers. Reads names, and headers of weights.

    `opened` has the headers of a folder whose weights are quantised.
    """
    beside = (*CONFIGS, *TOKENIZER_READERS, *VOCABULARIES, CHAT_TEMPLATE, "preprocessor_config.json")
    if not candidate.path.is_dir():
        return LoadedFiles(candidate.files)
    files, differences = candidate.files, []
    if candidate.kind is ArtifactKind.GENERATION:
        judged = dict(candidate.graph_files) | {name: files[name] for name in beside if name in files}
        why = "a loader takes it before the two decoders"
    else:
        checkpoint = opened or candidate.checkpoint
        names = {*checkpoint.shards, checkpoint.index, *beside, *candidate.module_files}
        judged = {name: files[name] for name in sorted(names & set(files))}
        why = "a loader may take it"
        if named := checkpoint.config.get(OTHER_FILE):
            differences = [
                f"{CONFIG} names the weights {named!r} ({OTHER_FILE}), which transformers loads in place of those that "
                "were judged. Remove this entry"
            ]
    others = sorted(set(files) - set(judged) - OF_THE_OUTPUT)
    leftovers = [name for name in others if _is_leftover(name, candidate.kind)]
    differences = [f"{name} is not what was judged, and {why}. Remove it" for name in leftovers] + differences
    others = [name for name in others if name not in leftovers]
    weights = [name for name in others if name.endswith(WEIGHT_ENDINGS) and not OF_TRAINERS.fullmatch(name)]
    not_judged = [f"other weights in the folder: {first_of(weights, SHOWN_FILES)}"] if weights else []
    texts = [name for name in others if name.endswith((*WEIGHT_ENDINGS, *TEXTS)) and name not in weights]
    notes = [f"not compared: {first_of(texts, SHOWN_FILES)}"] if texts else []
    found = (tuple(map(one_line, lines)) for lines in (notes, not_judged, (), differences))
    return LoadedFiles(judged, Findings(*found))


def _is_leftover(name: str, kind: ArtifactKind) -> bool:
    if kind is ArtifactKind.GENERATION:
        return Path(name).name == MERGED_DECODER
    return NAMES_OF_LOADERS.fullmatch(name) is not None
