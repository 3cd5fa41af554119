"""Processes that compute one model together: how they talk, and how they end together.

Knows arrays and messages, no model. Arrays travel through MLX's collectives; what rank 0 asks of
the others, and signs of life, through plain sockets beside them (see channel).
"""
