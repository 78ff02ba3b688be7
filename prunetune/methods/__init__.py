"""What happens to the weights around a training step: masks that are learnt, rest, move or close."""
