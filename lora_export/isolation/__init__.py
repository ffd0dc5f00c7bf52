"""Work on files of strangers within bounds: the limits, and processes that are ended where they go beyond them."""
