"""Verbs of the command line that train, measure and export models."""
