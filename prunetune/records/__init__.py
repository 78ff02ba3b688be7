"""What a sweep has found: its ledger, the best per density, what is kept, and the report."""
