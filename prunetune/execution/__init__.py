"""What runs trials: Ray Tune or this process behind one seam; one training data-parallel with Ray Train."""
