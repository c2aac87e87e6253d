"""Pictures of what is inside a model, drawn with Pillow alone: feature maps, attention, attributions."""
