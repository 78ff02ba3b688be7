"""What the project costs and how fast it is: `python -m benchmarks.NAME`, figures in `benchmarks/results/`.

- `sweep_cost`: a search, against plain Ray Tune.
- `step_time`: a training step, against a plain PyTorch loop and against what the hardware allows.
- `vectorized`: several trials' epochs as one batched program.
- `orchestration`: what a sweep adds to a trial's training.
- `scaling`: more workers.
- `history`: thousands of past trials.
- `tables`: the tables of docs/benchmarks.md, from the committed results.
"""
