"""The offline command `megaprior-data`: raw pairs and text in, shards out, and eyes to look at them.

Importing this package imports nothing; every command loads what it needs when it runs.
"""
