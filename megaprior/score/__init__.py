"""Scorers: whatever writes one float per caption token, aligned with the `tokens` stream of a shard."""
