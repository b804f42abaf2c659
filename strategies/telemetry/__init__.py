"""What the server tells about itself: status page, metrics, event files."""
