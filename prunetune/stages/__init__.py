"""The three stages of the paper's pipeline; each returns at once when the store has its result."""
