"""Numbers with their noise, and answers of trained adapters."""
