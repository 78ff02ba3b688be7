"""Where trials run: on Ray Tune's workers, or data-parallel with Ray Train."""
