"""The benchmarks: run them by `python -m benchmarks.NAME`; their results are in `benchmarks/results/`.

- `sweep_cost`: the cost of a search, compared with plain Ray Tune.
- `one_network`: the accuracy of one pre-training at every density, without a search.
- `step_time`: the time of a training step, compared with a plain PyTorch loop and the hardware's limits.
- `vectorized`: the rate of several trials' epochs as one batched program.
- `orchestration`: the time that a sweep adds to a trial's training.
- `scaling`: the rate of trials with more workers.
- `history`: the cost of thousands of past trials.
- `tables`: writes the tables of docs/benchmarks.md from the committed results.
"""
