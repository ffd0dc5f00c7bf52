"""Merging adapters into the weights of a graph: in memory (`fold`) and from file to file (`merge_graph`)."""
