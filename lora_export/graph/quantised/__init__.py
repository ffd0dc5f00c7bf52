"""Weights of a graph in few bits: how they are stored, and how a changed one is quantised again."""
