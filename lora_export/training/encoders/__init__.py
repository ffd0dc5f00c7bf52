"""Rows as inputs and labels of a model: one file for each kind of row."""
