"""Who is told of a sweep while it runs: MLflow, and the person at the terminal."""
