"""The kinds of connections: one bilinear map a file."""
