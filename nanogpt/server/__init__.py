"""HTTP server of serve.py: access control, request scheduling, OpenAI-compatible API."""
