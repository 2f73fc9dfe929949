"""What a study says: results, findings, status, comparisons. Nothing here imports torch."""
