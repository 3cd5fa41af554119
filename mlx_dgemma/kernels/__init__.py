"""Fused operations: each a Metal kernel beside its twin in plain MLX operations."""
