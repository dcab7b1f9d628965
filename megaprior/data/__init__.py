"""Shards on disk, and the way from them to a row of the model: order, packing, weights, batches."""
