"""Architectures of the zoo; found by name through `layercast.models.registry`."""
