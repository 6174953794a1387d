"""Recipes measured side by side, for speed."""
