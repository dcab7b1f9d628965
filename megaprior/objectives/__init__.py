"""Objectives: from a model's states and a batch to a loss, each in a class of its own."""
