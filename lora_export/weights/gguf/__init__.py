"""GGUF files as bases: their types of blocks, their names, and merges that keep both."""
