"""Encoding a corpus of any size with an exported model, and searching it."""
