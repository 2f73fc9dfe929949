"""PEFT Study."""
