"""Thought streams on an unmodified transformers backbone."""
