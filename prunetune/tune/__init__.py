"""The three stages as a Ray Tune trainable, for users who have their own `tune.Tuner`.

    from ray import tune
    from prunetune.tune import PipelineTrainable

    tuner = tune.Tuner(
        PipelineTrainable.on("sweeps/digits.yaml", storage="runs"),
        param_space={
            "density": tune.grid_search([0.1, 0.01]),
            "pre_pruning.mask": None,
            "pre_pruning.initializer": "kaiming",
            "pre_pruning.optimizer.lr": tune.loguniform(1e-3, 1e-2),
            "post_pruning.optimizer.lr": tune.loguniform(1e-3, 2e-2),
            "post_pruning.label_smoothing": None,
            "post_pruning.soft_activation": None,
            "post_pruning.soft_skip": None,
        },
    )

It works with any searcher and scheduler, and with `Tuner.restore`. `python -m prunetune.sweep` searches the
same space in less time, because it plans which stages trials share, and reuses its workers.
"""

from prunetune.tune.trainable import PipelineTrainable

__all__ = ["PipelineTrainable"]
