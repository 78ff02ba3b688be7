"""Join a Ray cluster, and check whether its nodes can run a sweep."""
