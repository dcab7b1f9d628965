"""Models: tensors in, tensors out. They know nothing of shards, batches or training."""
