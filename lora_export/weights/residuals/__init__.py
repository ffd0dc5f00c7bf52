"""What a merge loses of its base, in a file: with the merged weights and the adapters it gives the base bit for bit.

prediction.py  what the base's rows would be, from the merged ones and ΔW, and how far they are from these bits
archive.py     the file: a zip archive, written by a merge with `keep_residual`, read within bounds
restoring.py   unmerge
"""
