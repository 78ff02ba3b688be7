"""A sweep as MLflow shows it; written by one thread."""
