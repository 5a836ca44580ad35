"""The LM head fused with an operation, and vocabulary shards."""
