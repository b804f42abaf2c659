"""The owner's side of split tuning."""
