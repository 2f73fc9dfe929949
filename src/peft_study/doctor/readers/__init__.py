"""Readers of what other tools have written: logs, training arguments, adapters' folders."""
