"""What a configuration chooses by name: criteria, optimizers, data sources and the like, and anybody's own.

A `Kind` is one sort of such components. It knows the built-in ones by name; any other is given by its import
path, `package.module:object`. Components are imported when they are asked for, so that a list of names costs
nothing and whoever does not use a framework does not load it.

A component is a function or a class. Its *options*, the further keys that a configuration gives it, are its
parameters but for those that this project passes: the first ones, `positional` of the kind, and those that
are listed in the kind's `provided`. They are checked against their annotations: `lr: Annotated[float,
Field(gt=0)]`. Built-in components have keyword-only options.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, final

from pydantic import BaseModel, ConfigDict, create_model

from prunetune.errors import did_you_mean

_SETTINGS = ConfigDict(
    extra="forbid",
    frozen=True,
    strict=True,
    allow_inf_nan=False,
    arbitrary_types_allowed=True,
    protected_namespaces=(),
)


class UnknownComponentError(ValueError):
    """There is no component of this name, or it cannot be imported."""


@final
class Kind:
    """One sort of component. `what` names it in messages: "criterion"."""

    def __init__(
        self,
        what: str,
        built_in: Mapping[str, str],
        *,
        positional: int = 0,
        provided: Iterable[str] = (),
        is_tolerant: bool = True,
    ) -> None:
        """`built_in` maps names to import paths.

        The first `positional` parameters and those in `provided` are no options. With `is_tolerant` an option
        of another built-in component is ignored where it does not apply: so `momentum` may stand beside an
        optimizer's name that is searched over `sgd` and `adam`.
        """
        self.what = what
        self._built_in = dict(built_in)
        self._provided = frozenset(provided)
        self._positional = positional
        self._is_tolerant = is_tolerant

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the built-in components."""
        return tuple(self._built_in)

    def is_built_in(self, name: str) -> bool:
        """Whether a component of this project has this name."""
        return name in self._built_in

    def find(self, name: str) -> Any:
        """The component itself: a function or a class.

        Raises UnknownComponentError for a name that is neither built in nor an import path, and for a path
        from which nothing can be imported.
        """
        return _load(self._path(name))

    def options(self, name: str) -> type[BaseModel]:
        """A pydantic model whose fields are the component's options, with their defaults and rules."""
        return _options(self.find(name), self._path(name), self._positional, self._provided)

    def takes(self, name: str, option: str) -> bool:
        """Whether the component has this option; of one that does not exist nothing is known: True."""
        try:
            model = self.options(name)
        except UnknownComponentError:
            return True
        return option in model.model_fields or model.model_config.get("extra") == "allow"

    def ignores(self, name: str, option: str) -> bool:
        """Whether the component has no such option, but another built-in one has."""
        if not self._is_tolerant or self.takes(name, option):
            return False
        return any(option in self.options(other).model_fields for other in self.names)

    def code(self, name: str) -> str | None:
        """SHA-256 of the source of a user's own component; None for a built-in one.

        It covers the module of the import path and all modules of the same top-level package that have been
        loaded, unless that package is an installed distribution. It is part of what determines a result: the
        same path with other code is another component.
        """
        return None if name in self._built_in else _source_digest(self._path(name))

    def _path(self, name: str) -> str:
        if name in self._built_in:
            return self._built_in[name]
        module, colon, attribute = name.partition(":")
        parts = [*module.split("."), *attribute.split(".")]
        if not colon or not all(part.isidentifier() for part in parts):
            raise UnknownComponentError(
                f"must be one of {', '.join(self.names)}, or an import path 'package.module:object'"
                + did_you_mean(name, self.names)
            )
        return name


def _load(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it; the console script does not
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise UnknownComponentError(
            f"cannot be imported: {type(error).__name__}: {error} "
            "(searched the working folder and the installed packages)"
        ) from error
    return found


@functools.cache
def _options(component: Any, path: str, positional: int, provided: frozenset[str]) -> type[BaseModel]:
    # By the component, not by its path: a module may have been edited and loaded again.
    try:
        parameters = list(inspect.signature(component).parameters.values())[positional:]
    except (TypeError, ValueError):  # written in C
        parameters, is_open = [], True
    else:
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hints = _hints(component)
    fields: dict[str, Any] = {}
    for parameter in parameters:
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.name not in provided:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (hints.get(parameter.name, Any), default)
    settings = ConfigDict(**{**_SETTINGS, "extra": "allow" if is_open else "forbid"})
    try:
        return _model(path, settings, fields)
    except Exception:  # annotations that pydantic has no rules for
        loose: dict[str, Any] = {name: (Any, default) for name, (_, default) in fields.items()}
        return _model(path, settings, loose)


def _model(name: str, settings: ConfigDict, fields: dict[str, Any]) -> type[BaseModel]:
    made: type[BaseModel] = create_model(name, __config__=settings, **fields)
    return made


def _hints(component: Any) -> dict[str, Any]:
    function: Callable[..., Any] = component.__init__ if inspect.isclass(component) else component
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # a name that exists for type checkers only
        return {}


def _source_digest(path: str) -> str:
    _load(path)
    module_name = path.partition(":")[0]
    package = module_name.partition(".")[0]
    names = {module_name} | {
        name for name in sys.modules if name.partition(".")[0] == package and not _is_installed(name)
    }
    sha = hashlib.sha256()
    for name in sorted(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and Path(file).is_file():
            sha.update(name.encode() + b"\0" + Path(file).read_bytes() + b"\0")
    return sha.hexdigest()


def _is_installed(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or bool({"site-packages", "dist-packages"} & set(Path(file).parts))


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
"""`pruning.criterion`: `criterion(scene, *, options…) -> scores` by weight name."""

INITIALIZERS = Kind(
    "initializer",
    {
        "default": "prunetune.sparsity.initializers:default",
        "kaiming": "prunetune.sparsity.initializers:kaiming",
        "zero": "prunetune.sparsity.initializers:zero",
        "zero_paper": "prunetune.sparsity.initializers:zero_paper",
    },
    positional=1,
    provided=("generator",),
)
"""`pre_pruning.initializer`: `initializer(shape, *, generator, options…) -> weight`."""

MASKS = Kind(
    "mask method",
    {
        "penalty": "prunetune.methods.bernoulli:Penalty",
        "target": "prunetune.methods.bernoulli:Target",
    },
    positional=1,
    provided=("density",),
)
"""`pre_pruning.mask.method`: masks that are learnt with the weights (`engine/constraint.py`)."""

DYNAMICS = Kind(
    "dynamic method",
    {
        "rigl": "prunetune.methods.dynamic:RigL",
        "set": "prunetune.methods.dynamic:Set",
    },
    positional=2,
    provided=("seed",),
)
"""`post_pruning.dynamic`: masks that move while training (`engine/constraint.py`)."""

OPTIMIZERS = Kind(
    "optimizer",
    {
        "sgd": "prunetune.engine.optimizers:sgd",
        "adam": "prunetune.engine.optimizers:adam",
        "adamw": "prunetune.engine.optimizers:adamw",
    },
    positional=1,
)
"""`….optimizer`: `optimizer(parameters, *, lr, options…) -> torch.optim.Optimizer`."""

RATE_SCHEDULES = Kind(
    "schedule of the learning rate",
    {
        "constant": "prunetune.sparsity.schedules:constant",
        "cosine": "prunetune.sparsity.schedules:cosine",
        "step": "prunetune.sparsity.schedules:step",
    },
)
"""`….optimizer.schedule`: `schedule(*, options…)` gives the rate's factor over a stage, time in [0, 1]."""

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
"""`data.name`: `source(root, *, options…) -> Source` (`data/dataset.py`)."""

TASKS = Kind(
    "task",
    {
        "classification": "prunetune.tasks.classification:Classification",
        "regression": "prunetune.tasks.regression:Regression",
    },
    positional=1,
)
"""`task`: `task(form, *, options…) -> Task`, a class as `tasks/task.py` has it."""

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
"""`model.name`: makes a `torch.nn.Module`; it gets `input_shape` and `num_classes` if it names them.

`num_classes` is the number of outputs that the task needs, for classes or not.
"""

EXECUTORS = Kind(
    "executor",
    {"ray": "prunetune.execution.ray_tune:RayTune", "in_process": "prunetune.execution.in_process:InProcess"},
)
"""`run_sweep(…, executor=…)`: runs the trials (`execution/seam.py`)."""

SAMPLERS = Kind(
    "sampler",
    {"tpe": "prunetune.search.samplers:tpe", "random": "prunetune.search.samplers:random"},
    provided=("seed",),
)
"""`search.sampler`: `sampler(*, seed, options…) -> optuna.samplers.BaseSampler`."""

EARLY_STOPPING = Kind(
    "early stopping",
    {"asha": "prunetune.search.early_stopping:Asha"},
    positional=1,
)
"""`search.early_stopping`: one object per density that says which trials end."""

TRACKERS = Kind("tracker", {"mlflow": "prunetune.trackers.built_in:mlflow"}, positional=1)
"""`tracking.trackers`: `tracker(sweep, *, options…) -> Tracker` (`trackers/tracker.py`)."""
