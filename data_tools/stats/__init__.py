"""What a shard folder holds: lengths, images, vocabulary, duplicates, and how it packs."""
