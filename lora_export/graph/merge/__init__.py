"""Merging adapters into the weights of a graph: in memory (`fold_graph`) and from file to file (`merge_graph`)."""
