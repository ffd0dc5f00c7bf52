"""Names of what a decoder's graph with a key/value cache takes and returns, as exporters and runtimes use them."""

IDS, MASK = "input_ids", "attention_mask"
POSITIONS = ("position_ids", "cache_position")  # [batch, tokens] and [tokens]
BRANCH = "use_cache_branch"  # of optimum's graphs that contain one graph for a prompt and one for a step
LOGITS = "logits"
PAST, PRESENT = "past_key_values", "present"  # of the cache's inputs and outputs: `past_key_values.0.key`
KEY_VALUE = ("key", "value")
