"""What a merge loses of its base, in a file: with the merged weights and the adapters it gives the base bit for bit.

bit_differences.py  integers that say how far one bit pattern is from another, packed
exact_change.py     ΔW with the same bits on every machine
prediction.py       what the base's rows would be, from the merged ones; both sides compute it
archive.py          the file: a zip archive, read within bounds
writing.py          merge with `keep_residual`
restoring.py        unmerge
"""
