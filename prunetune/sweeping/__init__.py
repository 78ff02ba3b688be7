"""Runs a sweep from its file to its results: open and check it, run its trials, return what was found."""
