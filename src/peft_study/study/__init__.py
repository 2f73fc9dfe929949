"""Runs and small studies: what trials share, the folder of a run, what a comparison says."""
