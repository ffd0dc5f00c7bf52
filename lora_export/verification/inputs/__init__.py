"""Inputs for a proof: from a model, from a graph alone, and whether they reach an adapter's rows."""

REDRAWS = 5  # draws of an input before it counts as one that cannot be varied
