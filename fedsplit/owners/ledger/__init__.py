"""The owner's ledger of what left, and the check before anything leaves."""
