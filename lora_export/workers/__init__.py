"""Where jobs run, and how the job of a worker that died is tried again. Knows nothing of what a job does."""
