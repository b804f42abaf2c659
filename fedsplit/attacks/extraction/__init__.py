"""Extraction: how far an owner can train an emulator back toward the model it stands for."""
