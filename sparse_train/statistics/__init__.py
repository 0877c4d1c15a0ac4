"""Running sums over the inputs of layers, and which layers have one input; ``pipeline`` says what is recorded when."""
