"""What the server answers, free of any transport: the inference protocol and the feature service."""
