"""The model types of transformers, and what only the class of a model tells of its modules.

`modules.json` has the names alone, written by `make names`: a merge does not import transformers.
`tests/names/test_model_types.py` compares it with the installed transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).with_name("modules.json")
_TABLE = json.loads(PATH.read_text(encoding="utf-8"))

KNOWN_MODEL_TYPES = frozenset(_TABLE["model_types"])
# Model type -> the last parts of the names of its modules that are `Conv1D`, whose weights are stored (in, out). All
# other linear layers of these types are `nn.Linear`, (out, in).
CONV1D_MODULES = {name: frozenset(modules) for name, modules in _TABLE["conv1d"].items()}
# Model type -> modules of the same names that are nn.Linear
LINEAR_MODULES = {name: frozenset(modules) for name, modules in _TABLE["linear_of_these_names"].items()}
# The last parts of the names of tables of embeddings. A file tells nn.Embedding from nn.Linear in no other way.
EMBEDDING_MODULES = frozenset(_TABLE["embeddings"])


def is_embedding(module: str) -> bool:
    """Whether a module of this name is a table of embeddings in transformers."""
    return module.rpartition(".")[2] in EMBEDDING_MODULES
