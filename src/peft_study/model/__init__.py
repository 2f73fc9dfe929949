"""The one frozen base: loading, precision, segment attention, the chunked head, and the proof that both are right."""
