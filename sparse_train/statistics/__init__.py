"""What is known of the inputs of layers: recorded in training forwards, shared, summed over ranks, remembered."""
