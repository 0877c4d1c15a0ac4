"""The masked layer: parameter, packed mask, product, low-rank factors inside the mask; whole models."""
