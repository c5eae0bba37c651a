"""The kinds of connections: one bilinear map per file."""
