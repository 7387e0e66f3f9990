"""Sorting a gallery by similarity: exact ranking, galleries, and re-ranking."""
