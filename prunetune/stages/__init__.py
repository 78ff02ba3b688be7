"""The stages of the paper's pipeline; each returns at once if the store already has its result."""
