"""Tells what is wrong with a training run, ours or another tool's: before it starts, while it runs and after.

readers ──► Observations (plain numbers, None: not known) ──► rules ──► Diagnosis
"""
