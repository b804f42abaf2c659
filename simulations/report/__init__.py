"""A run as a page that one opens in a browser, and a page that compares runs."""
