"""The owner's side of private inference."""
