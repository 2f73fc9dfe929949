"""Who trains: one engine in this process, or several in processes of this machine or on a Ray cluster."""
