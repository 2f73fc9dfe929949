"""Trials in slots on one base: packed rows, optimizers and schedules, checkpoints, guards."""
