"""Engine of layercast's own for transformer encoders: whole blocks in one call."""
