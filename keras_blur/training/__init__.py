"""Shared parts of both trainers: the outer training loop, checkpoints and run settings."""
