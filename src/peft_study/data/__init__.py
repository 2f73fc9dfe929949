"""Rows on disk to examples: sources, formats, conversion, samples, chat templates, tokens and their cache."""
