"""A sweep from its file to its results: opened and checked, run, handed back."""
