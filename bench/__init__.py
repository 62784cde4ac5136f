"""Measurements; each file prints its figures. See README.md."""
