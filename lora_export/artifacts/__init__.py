"""What a path is, found out once: its kind, its files and hashes, its record, and the tensors in it."""
