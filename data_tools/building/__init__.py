"""Samples to shards: the plan, one job one shard, workers, ranks, parts, and the folder they all write into."""
