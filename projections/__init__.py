"""What it looks like: views built from the ledger, all of them disposable."""
