"""A sweep's records: the ledger of its trials, the best per density, what the store keeps, and the report."""
