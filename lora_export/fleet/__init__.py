"""Many adapters, each through the same steps: planned by headers, run where it is not done, and shown as one table."""
