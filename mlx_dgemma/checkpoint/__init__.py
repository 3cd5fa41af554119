"""A checkpoint on disk or on the Hub becomes a model in memory."""
