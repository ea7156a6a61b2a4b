"""What the launchers run before and beside the training."""
