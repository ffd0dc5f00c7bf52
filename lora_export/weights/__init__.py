"""Executor 1: a plan over a checkpoint on disk. NumPy; torch only where CUDA was requested.

checkpoint.py     open_checkpoint: headers, config and index of a base
merge.py          merge_checkpoint: every file of the base into a file of the output
one_pass.py       merges of one base in one pass over it
kept_weights.py   quantised weights that change and stay quantised
output_files.py   config, index and the other files of the output
tensor_blocks.py  the tensors of an output, as blocks that are copied or changed
apply_step.py     what a step does to some rows: sum, round once, measure
cuda.py           the same on a GPU
merge_report.py   what became of each weight, in numbers
task_head.py      the config of a model whose adapter has a task head
"""
