"""The verdict: a candidate against PyTorch, against a graph, or against a checkpoint."""
