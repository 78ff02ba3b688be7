"""The components that a configuration chooses by name: criteria, optimizers, data sources and so on.

A built-in component is added by a line here. Your own need none: they are named by their import path,
`package.module:object` (`kind.py` says how components are found, and what their options are).
"""

from __future__ import annotations

from prunetune.kind import Kind

CRITERIA = Kind(
    "criterion",
    {
        "magnitude": "prunetune.sparsity.criteria:magnitude",
        "random": "prunetune.sparsity.criteria:random",
        "snip": "prunetune.sparsity.criteria:snip",
        "grasp": "prunetune.sparsity.criteria:grasp",
        "synflow": "prunetune.sparsity.criteria:synflow",
        "taylor": "prunetune.sparsity.criteria:taylor",
    },
    positional=1,
)
"""`pruning.criterion`: a function `criterion(scene, *, options…)` that returns scores by weight name."""

INITIALIZERS = Kind(
    "initializer",
    {
        "default": "prunetune.sparsity.initializers:default",
        "kaiming": "prunetune.sparsity.initializers:kaiming",
        "zero": "prunetune.sparsity.initializers:zero",
        "zero_paper": "prunetune.sparsity.initializers:zero_paper",
    },
    positional=1,
    required=("generator",),
)
"""`pre_pruning.initializer`: a function `initializer(shape, *, generator, options…)` that draws a weight."""

MASKS = Kind(
    "mask method",
    {
        "penalty": "prunetune.methods.bernoulli:Penalty",
        "target": "prunetune.methods.bernoulli:Target",
        "path": "prunetune.methods.path:Path",
    },
    positional=1,
    provided=("density", "steps"),
)
"""`pre_pruning.mask.method`: a class of masks that are learnt with the weights (`engine/constraint.py`).

It is called as `method(weights, *, options…)`, with `density` if its `aims_at_density` is true, and with
`steps`, the number of training steps of the stage, if it has a parameter of this name.
"""

DYNAMICS = Kind(
    "dynamic method",
    {
        "rigl": "prunetune.methods.dynamic:RigL",
        "set": "prunetune.methods.dynamic:Set",
    },
    positional=2,
    required=("seed",),
)
"""`post_pruning.dynamic`: a class of masks that move during training (`engine/constraint.py`).

It is called as `method(mask, optimizer, *, seed, options…)`.
"""

OPTIMIZERS = Kind(
    "optimizer",
    {
        "sgd": "prunetune.engine.optimizers:sgd",
        "adam": "prunetune.engine.optimizers:adam",
        "adamw": "prunetune.engine.optimizers:adamw",
    },
    positional=1,
)
"""`….optimizer`: a function `optimizer(parameters, *, lr, options…) -> torch.optim.Optimizer`."""

RATE_SCHEDULES = Kind(
    "schedule of the learning rate",
    {
        "constant": "prunetune.sparsity.schedules:constant",
        "cosine": "prunetune.sparsity.schedules:cosine",
        "step": "prunetune.sparsity.schedules:step",
    },
)
"""`….optimizer.schedule`: a function `schedule(*, options…)` that returns a function of time in [0, 1].

Time is the share of the stage that is done; the function returns the factor of the learning rate.
"""

DATA_SOURCES = Kind(
    "data source",
    {
        "digits": "prunetune.data.sources.digits:digits",
        "mnist": "prunetune.data.sources.torchvision:mnist",
        "fashion_mnist": "prunetune.data.sources.torchvision:fashion_mnist",
        "cifar10": "prunetune.data.sources.torchvision:cifar10",
        "cifar100": "prunetune.data.sources.torchvision:cifar100",
        "parquet": "prunetune.data.sources.parquet:parquet",
        "image_folder": "prunetune.data.sources.image_folder:image_folder",
        "tabular": "prunetune.data.sources.tabular:tabular",
        "diabetes": "prunetune.data.sources.diabetes:diabetes",
    },
    positional=1,
)
"""`data.name`: a function `source(root, *, options…) -> Source` (`data/dataset.py`)."""

TASKS = Kind(
    "task",
    {
        "classification": "prunetune.tasks.classification:Classification",
        "regression": "prunetune.tasks.regression:Regression",
    },
    positional=1,
)
"""`task`: a class `task(form, *, options…)` that implements `Task` (`tasks/task.py`)."""

MODELS = Kind(
    "model",
    {
        "mlp": "prunetune.models.mlp:Mlp",
        "vgg16": "prunetune.models.vgg:vgg16",
        "resnet20": "prunetune.models.resnet:resnet20",
        "resnet18": "prunetune.models.resnet:resnet18",
        "vit_tiny": "prunetune.models.vit:VitTiny",
    },
    provided=("input_shape", "num_classes"),
    is_tolerant=False,
)
"""`model.name`: a class or function that makes a `torch.nn.Module`.

It gets `input_shape` and `num_classes` if it has parameters of these names. `num_classes` is the number of
outputs that the task needs, whether they are classes or not.
"""

EXECUTORS = Kind(
    "executor",
    {"ray": "prunetune.execution.ray_tune:RayTune", "in_process": "prunetune.execution.in_process:InProcess"},
    is_keyed=False,
)
"""`run_sweep(…, executor=…)`: a class of executors, which run the trials (`execution/seam.py`)."""

SAMPLERS = Kind(
    "sampler",
    {"tpe": "prunetune.search.samplers:tpe", "random": "prunetune.search.samplers:random"},
    required=("seed",),
    is_keyed=False,
)
"""`search.sampler`: a function `sampler(*, seed, options…) -> optuna.samplers.BaseSampler`."""

EARLY_STOPPING = Kind(
    "early stopping",
    {"asha": "prunetune.search.early_stopping:Asha"},
    required=("longest",),
    is_keyed=False,
)
"""`search.early_stopping`: a class `rule(*, longest, options…)` that implements `StoppingRule`.

One object per density decides which trials end early (`search/early_stopping.py`).
"""

TRACKERS = Kind("tracker", {"mlflow": "prunetune.trackers.built_in:mlflow"}, positional=1, is_keyed=False)
"""`tracking.trackers`: a function `tracker(sweep, *, options…) -> Tracker` (`trackers/tracker.py`)."""
