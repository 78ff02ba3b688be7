"""Configuration files: reading them, checking them, and the search space of their distributions."""
