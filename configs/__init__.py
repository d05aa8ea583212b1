"""The experiments: one file each; `base.py` holds the paper's settings, and every other file is a short diff of it."""
