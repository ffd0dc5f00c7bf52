"""How transformers renames and converts the weights of a checkpoint while it loads them, without transformers.

table.py          the frozen table: rules, and the classes that an architecture is made of
transformers.json the table itself, written by `make names`
rename_rules.py   one rule: a regular expression, and the operations of a converter
architecture.py   the rules for the model that a config describes
loaded_names.py   the names that stored tensors have in the loaded model
tensor_parts.py   which entries of stored tensors a converted tensor consists of
"""
