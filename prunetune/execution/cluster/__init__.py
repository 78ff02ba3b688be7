"""Joining a Ray cluster, and asking its nodes what they have."""
