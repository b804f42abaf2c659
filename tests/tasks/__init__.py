"""Tasks: labels, losses, reports and answers of each."""
