"""The sections of a configuration: their keys, types and defaults, and the rules for single values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prunetune import registry
from prunetune.config.component import Component, default
from prunetune.kind import UnknownComponentError


class Section(BaseModel):
    """Base class of sections, in which unknown keys, wrong types and infinite numbers are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
        validate_default=True,
    )


class AugmentationConfig(Section):
    """Random changes of training images, drawn anew for each image and epoch."""

    crop_padding: int = Field(4, ge=0, description="zero-pad by this many pixels, crop back at random")
    flip: bool = Field(True, description="mirror left-right with probability 1/2")


class DataConfig(Component):
    """The data source, where its files are, and how they are split; further keys are its options."""

    kind: ClassVar = registry.DATA_SOURCES
    root: str = "data"
    batch_size: int = Field(128, ge=1)
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training examples")
    split_seed: int = Field(0, ge=0, description="draws the validation examples")
    limit: int | None = Field(None, ge=2, description="use at most this many training (and test) examples")
    augmentation: AugmentationConfig | None = None


class TaskConfig(Component):
    """The task, which says what the network learns; further keys are its options."""

    kind: ClassVar = registry.TASKS

    @model_validator(mode="after")
    def _is_a_task(self) -> Self:
        """Refuse a class that lacks what is read of a task before it is made."""
        try:
            component = self.component
        except UnknownComponentError:  # reported elsewhere
            return self
        if not all(hasattr(component, name) for name in ("metric", "targets", "gives_logits")):
            raise ValueError("is no subclass of prunetune.tasks.Task with a `metric`")
        return self


class ModelConfig(Component):
    """The network, built in or a user's own `nn.Module`; further keys are its constructor's arguments.

    `num_classes` and `in_channels` follow from the data; if they are given, they must agree with the data.
    """

    kind: ClassVar = registry.MODELS
    num_classes: int | None = Field(None, ge=2)
    in_channels: int | None = Field(None, ge=1)


class ScheduleConfig(Component):
    """The learning-rate schedule of a stage, in shares of the stage, so that it fits stages of any length."""

    kind: ClassVar = registry.RATE_SCHEDULES
    name: str = "constant"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the stage with a linear rise from 0")


class OptimizerConfig(Component):
    """The optimizer of the weights. Weight decay acts on weights, never on masks."""

    kind: ClassVar = registry.OPTIMIZERS
    schedule: ScheduleConfig = default(ScheduleConfig, "constant")


class InitializerConfig(Component):
    """The initializer, which draws the prunable weights before training."""

    kind: ClassVar = registry.INITIALIZERS


class MaskConfig(Component):
    """The method of a mask that is learnt together with the weights (paper, section 3.1)."""

    kind: ClassVar = registry.MASKS
    key: ClassVar = "method"
    name: str = "penalty"


class PrePruningConfig(Section):
    """Stage 1: train a network that can be pruned well."""

    epochs: int = Field(ge=0)
    optimizer: OptimizerConfig
    initializer: InitializerConfig = default(InitializerConfig, "default")
    mask: MaskConfig | None = None
    chance_patience: float | None = Field(
        0.25, gt=0, le=1, description="end as collapsed after this share of the epochs (3 at least) at chance"
    )


class PruningScheduleConfig(Section):
    """When weights are pruned: all at once, in rounds with retraining, or gradually during post-pruning.

    Iterative pruning retrains after each round but the last, with the optimizer of `pre_pruning` (of
    `post_pruning` where that is null); after round r of n the density is d^(r/n). Gradual pruning prunes
    further every `every` steps, on a cubic schedule between the shares `start` and `end` of the post-pruning
    stage.
    """

    key: ClassVar = "name"
    """The key of the value that may stand alone: `iterative` is short for `{name: iterative}`."""

    name: Literal["one_shot", "iterative", "gradual"] = "one_shot"
    rounds: int = Field(5, ge=2, description="for `iterative`")
    epochs: int = Field(5, ge=1, description="of retraining after each round but the last")
    start: float = Field(0.0, ge=0, lt=1, description="for `gradual`")
    end: float = Field(0.75, gt=0, le=1)
    every: int = Field(20, ge=1, description="steps")


def _named(value: Any) -> Any:
    return {PruningScheduleConfig.key: value} if isinstance(value, str) else value


def _rewind(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value not in (None, "none", "init") and not (whole and value >= 1):
        raise ValueError("must be none, init, or the number of a pre-pruning epoch (1 or more)")
    return value


class CriterionConfig(Component):
    """The criterion, which scores the weights for pruning."""

    kind: ClassVar = registry.CRITERIA


class PruningConfig(Section):
    """Stage 2: choose which weights stay, and the values with which they are trained further."""

    criterion: CriterionConfig = default(CriterionConfig, "magnitude")
    scoring_rounds: int | None = Field(
        None, ge=1, description="prune in so many rounds, scoring anew (null: 100 for synflow, else 1)"
    )
    samples_per_class: int = Field(10, ge=1, description="examples that snip, grasp and taylor look at")
    allocation: Literal["global", "uniform", "erk"] = "global"
    dense_layers: Literal["none", "first", "last", "both"] = "none"
    structure: Literal["unstructured", "channel", "2:4", "1:4", "4:8"] = "unstructured"
    schedule: Annotated[PruningScheduleConfig, BeforeValidator(_named)] = PruningScheduleConfig()
    from_epoch: Literal["last", "best"] = Field(
        "last", description="of pre-pruning, if any: best has the highest validation score after pruning"
    )
    rewind: Annotated[int | str | None, BeforeValidator(_rewind)] = "none"
    sanity_check: Literal["shuffle", "redraw", "invert"] | None = Field(
        None, description="break the method on purpose (arXiv 2009.08576)"
    )


class DynamicConfig(Component):
    """Dynamic sparse training: the mask moves during training, at a constant density."""

    kind: ClassVar = registry.DYNAMICS


class RescaledInitConfig(Section):
    """ToST's layer-wise rescaled initialization (LRsI): GradInit learns one scale per weight tensor."""

    iterations: int = Field(180, ge=1)
    eta: float = Field(0.1, gt=0, description="length of the look-ahead step")
    gamma: float = Field(1.0, gt=0, description="bound on the gradient's norm")
    lr: float = Field(0.01, gt=0)
    min_scale: float = Field(0.01, gt=0)


class LabelSmoothingConfig(Section):
    """Label smoothing whose strength decays over the first T epochs: α_t = α0 (1 − t/T)."""

    alpha0: float = Field(ge=0, lt=1)
    horizon: float = Field(1.0, gt=0, le=1, description="T, as a share of the stage's epochs")

    @property
    def is_zero(self) -> bool:
        """Whether the section has the same effect as null."""
        return self.alpha0 == 0


class SoftActivationConfig(Section):
    """PSwish in the place of ReLU, with β_t rising from β0 to β_max over the first T epochs; then ReLU."""

    beta0: float = Field(ge=0)
    beta_max: float = Field(20.0, gt=0)
    horizon: float = Field(1.0, gt=0, le=1, description="T, as a share of the stage's epochs")


class SoftSkipConfig(Section):
    """Extra skip connections whose weight decays over the first T epochs: γ_t = γ0 (1 − t/T)."""

    gamma0: float = Field(ge=0)
    horizon: float = Field(1.0, gt=0, le=1, description="T, as a share of the stage's epochs")

    @property
    def is_zero(self) -> bool:
        """Whether the section has the same effect as null."""
        return self.gamma0 == 0


class PostPruningConfig(Section):
    """Stage 3: train the weights that pruning has kept."""

    epochs: int = Field(ge=1)
    optimizer: OptimizerConfig
    label_smoothing: LabelSmoothingConfig | None = None
    soft_activation: SoftActivationConfig | None = None
    soft_skip: SoftSkipConfig | None = None
    rescaled_init: RescaledInitConfig | None = None
    dynamic: DynamicConfig | None = None


class EarlyStoppingConfig(Component):
    """The rule that ends trials before their last post-pruning epoch, applied to each density by itself."""

    kind: ClassVar = registry.EARLY_STOPPING
    name: str = "asha"


class SamplerConfig(Component):
    """The sampler, which proposes the values of a trial."""

    kind: ClassVar = registry.SAMPLERS


class SearchConfig(Section):
    """The search: how configurations are proposed, how many, and which trials are stopped early."""

    sampler: SamplerConfig = default(SamplerConfig, "tpe")
    trials_per_density: int = Field(32, ge=1)
    exploration: float = Field(
        0.15, gt=0, le=1, description="share of the trials that pre-train a new network; others branch"
    )
    early_stopping: EarlyStoppingConfig | None = default(EarlyStoppingConfig, "asha")
    max_concurrent: int | None = Field(None, ge=1)


class KeepConfig(Section):
    """Which stages of a sweep the store keeps; those of the best and of unfinished trials always stay.

    `pre_pruning` is about all networks from which other trials may start: the pre-pruned ones, the early ones
    for rewinding, and those of iterative pruning's rounds.
    """

    post_pruning: Literal["best", "all"] = Field("best", description="per density, or of all trials")
    pre_pruning: Literal["sweep", "always"] = Field("sweep", description="while it has trials to run, or on")


class ResourcesConfig(Section):
    """The CPUs and GPUs of one worker; with a fraction of a GPU several workers share it.

    A worker runs `trials_per_worker` trials side by side, and trains their epochs as batched programs if the
    model allows it. `auto` chooses the number by the model's size.
    """

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    trials_per_worker: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"

    @field_validator("cpus", "gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1 it must be a whole number (Ray's rule)")
        return value


class TrackerConfig(Component):
    """A tracker, which shows or records a sweep somewhere while it runs."""

    kind: ClassVar = registry.TRACKERS


class TrackingConfig(Section):
    """The trackers of a sweep, and where MLflow writes."""

    uri: str | None = Field(
        None, description="MLflow's; null: $MLFLOW_TRACKING_URI, else a SQLite file in the run folder"
    )
    experiment: str | None = Field(None, description="MLflow's; null: the sweep's name")
    trackers: list[TrackerConfig] = Field(
        default_factory=lambda: [TrackerConfig.model_validate("mlflow")], description="[]: none"
    )

    @property
    def uses_mlflow(self) -> bool:
        """Whether MLflow is among the trackers."""
        return any(tracker.name == "mlflow" for tracker in self.trackers)


class Config(Section):
    """A whole configuration. For a training (`run_pipeline`, `prunetune.train`) `densities` has one entry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: autocast; auto: bf16 on a GPU that has it, else fp32"
    )
    compact_layers: bool = Field(
        True, description="on a CPU: pruned layers compute without the inputs and outputs that have no weight"
    )
    cuda_graphs: bool = Field(False, description="on a GPU: steps are recorded once per epoch, and replayed")
    task: TaskConfig = default(TaskConfig, "classification")
    data: DataConfig
    model: ModelConfig
    densities: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)
    pre_pruning: PrePruningConfig | None = None
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    post_pruning: PostPruningConfig
    search: SearchConfig = Field(default_factory=SearchConfig)
    keep: KeepConfig = KeepConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    storage: str = Field(
        # The variable lets the same file write to a folder on a laptop and to shared storage on a cluster.
        default_factory=lambda: os.environ.get("PRUNETUNE_STORAGE") or "runs",
        min_length=1,
        description="a folder or a URI (s3://…); by default $PRUNETUNE_STORAGE, else runs",
    )

    @field_validator("name")
    @classmethod
    def _not_the_store(cls, name: str) -> str:
        if name == "store":
            raise ValueError("is the name of the store's own folder; choose another")
        return name

    @field_validator("data")
    @classmethod
    def _as_the_task_wants(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        """Ask a source that can return targets as classes or as numbers for those that the task needs."""
        task = info.data.get("task")
        can_choose = "targets" in data.kind.options(data.name).model_fields
        if task is None or not can_choose or data.options.get("targets") is not None:
            return data
        return data.model_copy(update={"targets": task.component.targets})

    @field_validator("densities")
    @classmethod
    def _distinct(cls, densities: list[float]) -> list[float]:
        twice = sorted({d for d in densities if densities.count(d) > 1})
        if twice:
            raise ValueError(f"the density {twice[0]:g} is written twice")
        return densities

    @property
    def density(self) -> float:
        """The only density of a training. Raises ValueError where there are several."""
        if len(self.densities) != 1:
            raise ValueError(f"a single run needs one density; this configuration has {self.densities}")
        return self.densities[0]

    def at(self, density: float) -> Config:
        """Return a copy of this configuration with a single density."""
        return self.model_copy(update={"densities": [density]})

    def tree(self) -> dict[str, Any]:
        """Return the configuration as mappings, lists and scalars, as a YAML file would write it."""
        return self.model_dump(mode="json")


def pattern(structure: str) -> tuple[int, int]:
    """Return the numbers (n, m) of an `n:m` structure such as `2:4`."""
    n, _, m = structure.partition(":")
    return int(n), int(m)


DOES_NOT_DETERMINE: dict[str, str] = {
    "name": "names the folder of the sweep's own files",
    "data.root": "where the data are; their content is in every key",
    "search": "which configurations are tried, not what one of them gives",
    "keep": "what stays in the store",
    "resources": "what a worker takes of a machine",
    "tracking": "where results are shown",
    "storage": "where results are kept",
    "compact_layers": "the same result but for the order in which floats are added",
    "cuda_graphs": "the same kernels, launched together",
}
"""The fields of a configuration that do not determine its results, by dotted key, each with the reason.

All other fields are part of the keys under which results are stored, and distinguish trials. When a recorded
trial is resumed, it takes the values of these fields from today's file.
"""

COUNTS_WHEN: dict[tuple[type[BaseModel], str], tuple[str, Any, Callable[[Any], bool]]] = {
    (PruningScheduleConfig, "rounds"): ("name", "one_shot", lambda name: name == "iterative"),
    (PruningScheduleConfig, "epochs"): ("name", "one_shot", lambda name: name == "iterative"),
    (PruningScheduleConfig, "start"): ("name", "one_shot", lambda name: name == "gradual"),
    (PruningScheduleConfig, "end"): ("name", "one_shot", lambda name: name == "gradual"),
    (PruningScheduleConfig, "every"): ("name", "one_shot", lambda name: name == "gradual"),
    (PruningConfig, "allocation"): ("structure", "unstructured", lambda name: name == "unstructured"),
    (PruningConfig, "dense_layers"): ("structure", "unstructured", lambda name: name == "unstructured"),
    (LabelSmoothingConfig, "horizon"): ("alpha0", 0.0, lambda value: value > 0),
    (SoftSkipConfig, "horizon"): ("gamma0", 0.0, lambda value: value > 0),
    # Both must agree with the data, so they say nothing new; only a user's own constructor may get
    # `in_channels` as an argument.
    (ModelConfig, "num_classes"): ("name", None, lambda name: False),
    (ModelConfig, "in_channels"): ("name", None, lambda name: ":" in name),
}
"""Maps (section, field) to (a sibling, its default, a function: does its value make the field count?).

A field that does not count is not sampled, and hashes contain its default, so that configurations which
compute the same are equal. Components declare this for their own options (`Component.counts`).
"""
