"""Checkpoints from one layout and precision to another."""
