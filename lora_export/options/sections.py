"""The sections of a command's `--help`, in their order."""

from enum import StrEnum


class Section(StrEnum):
    """What options are about."""

    OPTIONS = "Options"
    DATA = "Data"
    ADAPTER = "The adapter"
    FROZEN_BASE = "The frozen base"
    STEPS = "The steps"
    MEASUREMENTS = "Measurements and checkpoints"
    BASE = "The base"
    OUTPUT = "The output"
    GRAPH = "The graph"
    PROOF = "The proof"
    EXPECTED = "What the adapter and the base must be"
    READING = "How adapters are read"
    COMBINING = "How adapters are combined"
    FILES = "Files and messages"
