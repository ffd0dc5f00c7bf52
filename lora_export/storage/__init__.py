"""Bytes on disk: read within bounds, copied in blocks, published whole or not at all."""
