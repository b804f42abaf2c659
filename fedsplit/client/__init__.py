"""The Flower ClientApp's work: one module per strategy."""
