"""Architectures of the plugin."""
