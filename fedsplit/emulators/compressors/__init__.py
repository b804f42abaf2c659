"""Ways to make an emulator, one per file."""
