"""What to try next, and what to stop. Nothing here knows Ray."""
