"""Running sums over the inputs of layers, and which layers share an input; ``pipeline`` decides what is recorded."""
