"""What an emulator would cost and reveal, before it is built."""
