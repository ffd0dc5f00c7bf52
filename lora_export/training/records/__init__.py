"""Rows of data sets by number, read from the disk when they are needed. No torch."""
