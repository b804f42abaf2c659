"""A server that lies, played against the owner's real code."""
