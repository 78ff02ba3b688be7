"""Writes a sweep to MLflow, and reads configurations back from it."""
