"""The masked layer: parameter, packed mask, their product, factors inside it, shards; and what models consist of."""
