"""The computer: what it is, and whether a model fits its memory."""
