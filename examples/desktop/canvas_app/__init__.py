"""A desktop app: ask, watch the canvas resolve, fill the holes of a text."""
