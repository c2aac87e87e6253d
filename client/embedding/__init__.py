"""A layer's values for every file of a directory, in one file: many requests in flight, resumed after a stop."""
