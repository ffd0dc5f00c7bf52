"""PEFT's kinds of adapters beside LoRA, one module each.

To add the kind NAME, write `peft_kinds/name.py` with `KIND`, see `kind.py`, and a row in `tests/support/peft_kinds.py`.
Every module of this folder that has a KIND is a kind. `reading.py` reads the files, and what all kinds have in common.
"""
