"""Training: one loop, and what it runs on."""
