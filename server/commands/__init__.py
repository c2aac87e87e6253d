"""Verbs of the command line that run on the server's side."""
