"""Modules that are not ours: their code and whether it may run, their weights, inputs and outputs, their export."""
