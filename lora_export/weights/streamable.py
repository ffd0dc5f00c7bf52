"""Whether a module can read the tensors of a checkpoint one by one, as they are stored. Reads headers alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from lora_export.weights.checkpoint import Checkpoint

READ_AS_STORED = frozenset(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))


def is_streamable(checkpoint: Checkpoint) -> bool:
    """Whether every tensor is a float of at most 32 bits, and transformers neither stacks nor splits any."""
    converters = checkpoint.rules.converters if checkpoint.rules else ()
    kinds = {entry.dtype for shard in checkpoint.shards.values() for entry in shard.entries.values()}
    return not checkpoint.quantised and not converters and kinds <= READ_AS_STORED
