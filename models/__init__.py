"""Models: layers, architectures, losses, data, training, hooks, export, and what an artefact holds."""
