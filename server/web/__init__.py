"""The HTTP side: health, metrics."""
