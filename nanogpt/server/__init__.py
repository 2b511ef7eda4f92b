"""The server behind serve.py: who is heard, whose turn it is, and what goes over the wire."""
