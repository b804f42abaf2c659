"""Maps that change a model's weights and keep its function."""
