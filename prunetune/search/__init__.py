"""Decide which trial to run next and which to stop; nothing here depends on Ray."""
