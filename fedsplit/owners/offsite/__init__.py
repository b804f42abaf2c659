"""The owner's side of offsite tuning."""
