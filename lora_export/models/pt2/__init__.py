"""Programs that `torch.export.save` wrote (.pt2), read and run so that nothing in their files can run by itself.

`torch.export.load` unpickles the sample inputs, sympifies sizes, imports what a structure's type names, looks any
`torch.` name up and compiles guards: it trusts its file. Here a file is a zip of stored members (`archive`), in which
the graph and what is said of the tensors are JSON (`fields`, `nouns`, `description`: none of these knows PyTorch), and
the weights are their bytes. No pickle is opened, no text is evaluated, and no name in a file is looked up anywhere but
in the file and in lists of ours (`operators`). What was read is run node by node, as a module with layers again
(`layering`, `program`), on inputs made for it (`specimens`).

Of the guards, those are kept that the sizes of the inputs tell: an axis of one size, axes of the same size, and their
ranges. What else they may say (a size that must be even) is not read.
"""
