"""Training losses of the plugin."""
