"""What a file may say: reading it, checking it, and the space of its distributions."""
