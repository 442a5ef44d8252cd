"""Optimisers of the plugin."""
