"""What is trained inside a model, and its files."""
