"""One module an endpoint: its request read, its reply written."""
