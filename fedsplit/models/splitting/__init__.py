"""Splitting a model into the owner's bottom and the server's top."""
