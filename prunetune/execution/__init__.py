"""Run trials with Ray Tune or in this process, behind one interface; run one training on several workers."""
