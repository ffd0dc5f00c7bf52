"""What a merge loses of its base, in a file: with the merged weights and the adapters it gives the base bit for bit.

bit_differences.py  integers that say how far one bit pattern is from another, packed
prediction.py       what the base's rows would be, from the merged ones and ΔW; the same bits on every machine
archive.py          the file: a zip archive, read within bounds
writing.py          merge with `keep_residual`
restoring.py        unmerge
"""
