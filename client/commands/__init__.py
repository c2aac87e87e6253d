"""Verbs of the command line that talk to a server."""
