"""How much memory and time a file may take that is read or judged: each limit, stated once.

Readers take their limits from here, and the guide shows LIMITS as a table. Models that are trained or exported are the
user's own: `require_memory` compares them with the memory that is available.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LIMITS: list[tuple[str, int, str]] = []  # of what, how many, of which unit


def _limit(of: str, most: int, unit: str) -> int:
    LIMITS.append((of, most, unit))
    return most


# --- Files that are run ---

MEMORY = _limit("a run of an ONNX graph or of a program, and the reading of a pickle", 2 * GIB, "bytes")
MEMORY_OF_FILE = _limit("the same, for each byte of the file", 4, "further bytes")
LEAST_TIMEOUT = _limit("a run of a file that is verified, where no other time limit is given", 60, "seconds")
TIMES_PYTORCH = _limit("the same, where it is more", 30, "times PyTorch's run of the largest generated inputs")
TIMEOUT = _limit("a run where PyTorch is not timed: a large model, own inputs, bfloat16, a graph alone", 600, "seconds")
MAX_CODE = _limit("one record of code in a TorchScript file", 64 * MIB, "bytes")
MAX_ANSWER = _limit("the names and shapes of what a process of its own answers", 64 * MIB, "bytes")
MAX_LEAST = _limit("the least size of an axis that a runner states", 1 << 24, "elements")  # such inputs are generated

# --- Endpoints ---

MAX_REQUESTS = _limit("a proof of an endpoint", 200, "requests")
MAX_RESPONSE = _limit("an answer of an endpoint", 64 * MIB, "bytes")
REQUEST_SECONDS = _limit("a request to an endpoint, with its repetitions, without another limit", 120, "seconds")

# --- Tokenizers and what they make ---

CHAT_SECONDS = _limit("a chat template, for one conversation", 10, "seconds")
CHAT_MEMORY = _limit("a chat template", 512 * MIB, "bytes")
MAX_CHAT = _limit("what a chat template makes of a conversation", 1 << 24, "characters")

# --- Files that are read ---

MAX_JSON = _limit("a JSON file", 100_000_000, "bytes")  # the index of the largest models has a tenth
MAX_HEADER = _limit("the header of a safetensors file", 100_000_000, "bytes")  # the format's own limit
MAX_GGUF_HEADER = _limit("the header of a GGUF file", 128 * MIB, "bytes")  # large vocabularies take a tenth
MAX_GGUF_ENTRIES = _limit("the same", 100_000, "fields, and as many tensors")  # models have some thousands
MAX_OBJECTS = _limit("one JSON text", 250_000, "objects")  # a header has one for each tensor
MAX_VALUES = _limit("one JSON text", 3_000_000, "values and lists")  # each takes up to a hundred bytes
MAX_DEPTH = _limit("one JSON text", 100, "objects and lists in each other")  # later functions recurse through them
MAX_SETTINGS = _limit("a YAML file, a `pyproject.toml`", 1_000_000, "bytes")  # such files have some kilobytes
MAX_PICKLE = _limit("the pickle in a file of `torch.save`", 64 * MIB, "bytes")  # it has names and shapes, and no values
MAX_OPCODES = _limit("the pickle in a file of `torch.save`", 2_000_000, "operations")  # some 35 for a tensor
MAX_INFLATED = _limit("what a packed file (`.npz`, `.parquet`) becomes", 64 * MIB, "bytes")
MAX_RATIO = _limit("the same, where it is more", 100, "times the file")  # masks and padding are packed less
MAX_ROW = _limit("a line of a `.jsonl`, `.csv` or text file", 64 * MIB, "bytes")
MAX_PIXELS = _limit("an image", 1 << 26, "pixels")  # 200 MB in RGB
MAX_SAMPLES = _limit("a sound, all channels together", 1 << 28, "samples")  # 1 GiB; 4 hours at 16 kHz
MAX_PATTERNS = _limit("`rank_pattern` and `alpha_pattern`, each", 10_000, "patterns")
MAX_PATTERN = _limit("one pattern", 1000, "characters")  # names of modules have a tenth of it
MAX_GROUP_DEPTH = _limit("one pattern", 20, "groups in each other")
MAX_STEPS = _limit("all patterns of a table on all modules", 10_000_000, "steps")  # some seconds; tables take thousands
MAX_MEASURED = _limit("a product of factors whose norm is computed", 1 << 28, "numbers")  # no layer has more


_stated: ContextVar[float | None] = ContextVar("stated", default=None)  # GiB, in place of MEMORY and MEMORY_OF_FILE


@contextlib.contextmanager
def stated_memory(gib: float | None) -> Iterator[None]:
    """Let each file that is run meanwhile take so many GiB, whatever its size. None: what its size allows."""
    before = _stated.set(gib)
    try:
        yield
    finally:
        _stated.reset(before)


def memory_for(nbytes: int) -> int:
    """The bytes of memory that a file of so many bytes may take where it is run."""
    stated = _stated.get()
    return MEMORY + MEMORY_OF_FILE * nbytes if stated is None else int(stated * GIB)
