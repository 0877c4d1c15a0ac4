"""The masked layer: a dense parameter, a packed mask, and their product; low-rank factors inside it; its shards."""
