"""Weights of a graph in few bits: how they are stored, and how a changed weight is quantised again."""
