"""What the project costs and how fast it is: `python -m benchmarks.NAME`, figures in `benchmarks/results/`.

step_time       a training step, against a plain PyTorch loop and against what the hardware allows
tables          the README's tables, from the committed results
"""
