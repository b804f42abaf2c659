"""The data owner's side of a session: bottom, private samples, noise secret, private-label loss."""
