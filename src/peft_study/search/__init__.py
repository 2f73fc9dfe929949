"""What is tried next: the scheduler of a study with its samplers, pruners and ranges."""
