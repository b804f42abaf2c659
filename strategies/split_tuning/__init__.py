"""Split tuning at the server."""
