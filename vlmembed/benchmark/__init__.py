"""Benchmarks by name, and evaluation folders beside them, by `mteb`. README.md in this folder is the page."""
