"""The three stages as a trainable of Ray Tune's, for those who have a `tune.Tuner` of their own.

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
same space in less time: it plans which stages trials share, and its workers stay.
"""

from prunetune.tune.trainable import PipelineTrainable

__all__ = ["PipelineTrainable"]
