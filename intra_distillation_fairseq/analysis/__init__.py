"""Looks at finished runs."""
