"""What lies on disk: folders of runs and studies, the journal, metrics, and files that appear whole or not at all."""
