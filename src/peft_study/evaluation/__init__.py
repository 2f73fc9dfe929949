"""What trained adapters answer."""
