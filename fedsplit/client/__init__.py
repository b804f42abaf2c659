"""The Flower ClientApp's work: one module per strategy, and the table that picks among them."""
