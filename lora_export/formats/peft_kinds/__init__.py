"""PEFT's kinds of adapters beside LoRA: functions for the change of one module, and their table, `kinds.toml`.

To add a kind, write its function in a module of this folder, a row of `kinds.toml`, and one of
`tests/support/peft_kinds.py`. `reading.py` reads the files, and what all kinds have in common.
"""
