"""The trackers, which record or show a sweep while it runs: MLflow, the live view at the terminal."""
