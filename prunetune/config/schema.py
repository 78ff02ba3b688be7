"""The sections of a configuration: keys, types, defaults and the rules of single values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
)

from prunetune.errors import did_you_mean

DataName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "parquet", "image_folder"]
Initializer = Literal["default", "kaiming", "zero", "zero_paper"]


class Section(BaseModel):
    """Base of every section: unknown keys, wrong types and infinities are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AugmentationConfig(Section):
    """Random training-time changes, drawn per image and epoch."""

    crop_padding: int = Field(4, ge=0, description="zero-pad by this many pixels, crop back at random")
    flip: bool = Field(True, description="mirror left-right with probability 1/2")


class DataConfig(Section):
    """Where the images are and how they are split."""

    name: DataName
    root: str = "data"
    batch_size: int = Field(128, ge=1)
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images")
    split_seed: int = Field(0, ge=0, description="draws the validation images")
    limit: int | None = Field(None, ge=2, description="use at most this many training (and test) images")
    image_size: int | None = Field(None, ge=1, description="resize to a square (parquet, image_folder)")
    augmentation: AugmentationConfig | None = None


class MlpConfig(Section):
    """Multi-layer perceptron on flattened images."""

    name: Literal["mlp"]
    hidden: list[Annotated[int, Field(ge=1)]] = Field([100] * 5, min_length=1)
    num_classes: int | None = Field(None, ge=2)
    in_channels: int | None = Field(None, ge=1)


class ConvConfig(Section):
    """A convolutional network in its CIFAR form."""

    name: Literal["vgg16", "resnet20", "resnet18"]
    width_multiplier: float = Field(1.0, gt=0, description="scales every layer's channels")
    num_classes: int | None = Field(None, ge=2)
    in_channels: int | None = Field(None, ge=1)


class VitConfig(Section):
    """A small vision transformer."""

    name: Literal["vit_tiny"]
    patch: int = Field(4, ge=1)
    dim: int = Field(192, ge=1)
    depth: int = Field(9, ge=1)
    heads: int = Field(3, ge=1)
    num_classes: int | None = Field(None, ge=2)
    in_channels: int | None = Field(None, ge=1)


BUILTIN_MODELS = ("mlp", "vgg16", "resnet20", "resnet18", "vit_tiny")


class UserModelConfig(BaseModel):
    """A user's own `nn.Module`, by import path; further keys are its constructor's arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @field_validator("name")
    @classmethod
    def _is_import_path(cls, name: str) -> str:
        module, colon, attribute = name.partition(":")
        parts = [*module.split("."), *attribute.split(".")]
        if not colon or not all(part.isidentifier() for part in parts):
            raise ValueError(
                f"must be one of {', '.join(BUILTIN_MODELS)}, or an import path 'package.module:Class'"
                + did_you_mean(name, BUILTIN_MODELS)
            )
        return name


def _model_tag(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    if name in ("vgg16", "resnet20", "resnet18"):
        return "conv"
    return name if name in ("mlp", "vit_tiny") else "user"


ModelConfig = Annotated[
    Annotated[MlpConfig, Tag("mlp")]
    | Annotated[ConvConfig, Tag("conv")]
    | Annotated[VitConfig, Tag("vit_tiny")]
    | Annotated[UserModelConfig, Tag("user")],
    Discriminator(_model_tag),
]


class ScheduleConfig(Section):
    """Learning-rate schedule over a stage, in shares of the stage so that it transfers to longer ones."""

    name: Literal["constant", "cosine", "step"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the stage with a linear rise from 0")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = [0.5, 0.75]
    factor: float = Field(0.1, gt=0, le=1, description="at each milestone, for `step`")

    @field_validator("milestones")
    @classmethod
    def _rising(cls, milestones: list[float]) -> list[float]:
        if sorted(set(milestones)) != milestones:
            raise ValueError("must rise")
        return milestones


def _named(value: Any) -> Any:
    """`cosine` is short for `{name: cosine}`."""
    return {"name": value} if isinstance(value, str) else value


class OptimizerConfig(Section):
    """SGD (with momentum), Adam or AdamW. Weight decay acts on weights, never on masks."""

    name: Literal["sgd", "adam", "adamw"]
    lr: float = Field(gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(0.0, ge=0)
    schedule: Annotated[ScheduleConfig, BeforeValidator(_named)] = ScheduleConfig()


class MaskConfig(Section):
    """Learnable Bernoulli mask (paper, section 3.1), with a warm-up of λ2 and an initial value beyond it.

    With `method: target` the expected number of open weights, Σ M, is set instead of pushed: after every
    step M is projected on the count of the density asked for, which falls from the initial one over
    `target_warmup`. So no λ2 has to be found per density, but pre-pruning is not shared between densities.
    """

    method: Literal["penalty", "target"] = "penalty"
    lambda1: float = Field(0.0, ge=0, description="weight of Σ M(1−M)")
    lambda2: float = Field(0.0, ge=0, description="weight of Σ M, for `penalty`")
    target_warmup: float = Field(0.7, gt=0, le=1, description="share of the stage until the target count")
    lambda2_warmup: float = Field(0.0, ge=0, le=1, description="share of the stage with λ2 rising from 0")
    initial: float = Field(0.5, gt=0, le=1, description="every M at the start")
    lr: float = Field(0.02, gt=0, description="Adam's step size for M")


class PrePruningConfig(Section):
    """Stage 1: train a network that is good to prune."""

    epochs: int = Field(ge=0)
    optimizer: OptimizerConfig
    initializer: Initializer = "default"
    mask: MaskConfig | None = None
    chance_patience: float | None = Field(
        0.25, gt=0, le=1, description="end as collapsed after this share of the epochs (3 at least) at chance"
    )


class PruningScheduleConfig(Section):
    """When weights go: all at once, in rounds with retraining between, or during post-pruning (cubic).

    Rounds are trained with the optimizer of `pre_pruning` (of `post_pruning` where that is null); after
    round r of n the density is d^(r/n). Gradual pruning updates the mask `every` so many steps, between the
    shares `start` and `end` of the post-pruning stage.
    """

    name: Literal["one_shot", "iterative", "gradual"] = "one_shot"
    rounds: int = Field(5, ge=2, description="for `iterative`")
    epochs: int = Field(5, ge=1, description="of retraining after each round but the last")
    start: float = Field(0.0, ge=0, lt=1, description="for `gradual`")
    end: float = Field(0.75, gt=0, le=1)
    every: int = Field(20, ge=1, description="steps")


def _rewind(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value not in (None, "none", "init") and not (whole and value >= 1):
        raise ValueError("must be none, init, or the number of a pre-pruning epoch (1 or more)")
    return value


class PruningConfig(Section):
    """Stage 2: which weights stay, and with which values they go on."""

    criterion: Literal["magnitude", "random", "snip", "grasp", "synflow", "taylor"] = "magnitude"
    scoring_rounds: int | None = Field(
        None, ge=1, description="prune in so many rounds, scoring anew (null: 100 for synflow, else 1)"
    )
    samples_per_class: int = Field(10, ge=1, description="images that snip, grasp and taylor look at")
    allocation: Literal["global", "uniform", "erk"] = "global"
    dense_layers: Literal["none", "first", "last", "both"] = "none"
    structure: Literal["unstructured", "channel", "2:4", "1:4", "4:8"] = "unstructured"
    schedule: Annotated[PruningScheduleConfig, BeforeValidator(_named)] = PruningScheduleConfig()
    rewind: Annotated[int | str | None, BeforeValidator(_rewind)] = "none"
    sanity_check: Literal["shuffle", "redraw", "invert"] | None = Field(
        None, description="break the method on purpose (arXiv 2009.08576)"
    )


class DynamicConfig(Section):
    """Dynamic sparse training: until `end` each layer drops and grows as many weights, now and then."""

    name: Literal["rigl", "set"]
    every: int = Field(100, ge=1, description="steps between updates")
    alpha: float = Field(0.3, gt=0, le=1, description="share dropped at the first update, cosine to 0")
    end: float = Field(0.75, gt=0, le=1, description="share of the stage after which the mask rests")


class RescaledInitConfig(Section):
    """ToST's layer-wise rescaled initialization (LRsI): GradInit on one scale per tensor."""

    iterations: int = Field(180, ge=1)
    eta: float = Field(0.1, gt=0, description="length of the look-ahead step")
    gamma: float = Field(1.0, gt=0, description="bound on the gradient's norm")
    lr: float = Field(0.01, gt=0)
    min_scale: float = Field(0.01, gt=0)


class LabelSmoothingConfig(Section):
    """α_t = α0 (1 − t/T)."""

    alpha0: float = Field(ge=0, lt=1)
    horizon: float = Field(1.0, gt=0, le=1, description="T, as a share of the stage's epochs")


class SoftActivationConfig(Section):
    """PSwish with β_t from β0 to β_max over T, then ReLU."""

    beta0: float = Field(ge=0)
    beta_max: float = Field(20.0, gt=0)
    horizon: float = Field(1.0, gt=0, le=1, description="T, as a share of the stage's epochs")


class SoftSkipConfig(Section):
    """Skip connections weighted by γ_t = γ0 (1 − t/T)."""

    gamma0: float = Field(ge=0)
    horizon: float = Field(1.0, gt=0, le=1, description="T, as a share of the stage's epochs")


class PostPruningConfig(Section):
    """Stage 3: train what is left."""

    epochs: int = Field(ge=1)
    optimizer: OptimizerConfig
    label_smoothing: LabelSmoothingConfig | None = None
    soft_activation: SoftActivationConfig | None = None
    soft_skip: SoftSkipConfig | None = None
    rescaled_init: RescaledInitConfig | None = None
    dynamic: Annotated[DynamicConfig | None, BeforeValidator(_named)] = None


class EarlyStoppingConfig(Section):
    """Asynchronous successive halving over post-pruning epochs, within one density; and what is too late.

    With `catch_up` a trial also ends when it would not come to the density's best even with a gain that
    only 1 - `catch_up` of the complete trials had from the same epoch on.
    """

    name: Literal["asha"] = "asha"
    grace_epochs: int = Field(2, ge=1, description="no trial is stopped before this many")
    reduction_factor: float = Field(3.0, gt=1, description="1 in this many goes on at each rung")
    catch_up: float | None = Field(0.9, gt=0, le=1, description="quantile of the gains; null: all may go on")


class SearchConfig(Section):
    """How configurations are proposed."""

    sampler: Literal["tpe", "random"] = "tpe"
    trials_per_density: int = Field(32, ge=1)
    exploration: float = Field(
        0.15, gt=0, le=1, description="share of the trials that pre-train a new network; others branch"
    )
    early_stopping: Annotated[EarlyStoppingConfig | None, BeforeValidator(_named)] = EarlyStoppingConfig()
    max_concurrent: int | None = Field(None, ge=1)


class KeepConfig(Section):
    """What the store keeps of a sweep. A best trial keeps all of its stages, an unfinished one too.

    `pre_pruning` is about all that is trained before post-pruning and that other trials may start from:
    the pre-pruned networks, the early ones to rewind to, and those of iterative pruning's rounds.
    """

    post_pruning: Literal["best", "all"] = Field("best", description="per density, or of all trials")
    pre_pruning: Literal["sweep", "always"] = Field("sweep", description="while it has trials to run, or on")


class ResourcesConfig(Section):
    """What one worker takes; a fraction of a GPU packs several workers on it.

    A worker runs `trials_per_worker` trials side by side, their epochs as batched programs where the model
    allows it; `auto` is as many as a model of its size leaves room for.
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


class TrackingConfig(Section):
    """Where MLflow writes; null is $MLFLOW_TRACKING_URI, else a SQLite file in the run folder."""

    uri: str | None = None
    experiment: str | None = None


class Config(Section):
    """One file. For a training run (`run_pipeline`, `prunetune.train`) `densities` has one entry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: autocast; auto: bf16 on a GPU that has it, else fp32"
    )
    compact_layers: bool = Field(
        True, description="on a CPU: pruned layers compute without the inputs and outputs that have no weight"
    )
    cuda_graphs: bool = Field(False, description="on a GPU: steps are recorded once per epoch, and replayed")
    data: DataConfig
    model: ModelConfig
    densities: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)
    pre_pruning: PrePruningConfig | None = None
    pruning: PruningConfig = PruningConfig()
    post_pruning: PostPruningConfig
    search: SearchConfig = SearchConfig()
    keep: KeepConfig = KeepConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: str = Field(
        # So that the same file writes to a folder on a laptop and to what all nodes share on a cluster.
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

    @field_validator("densities")
    @classmethod
    def _distinct(cls, densities: list[float]) -> list[float]:
        twice = sorted({d for d in densities if densities.count(d) > 1})
        if twice:
            raise ValueError(f"the density {twice[0]:g} is written twice")
        return densities

    @property
    def density(self) -> float:
        """The one density of a training run. Raises ValueError where there are several."""
        if len(self.densities) != 1:
            raise ValueError(f"a single run needs one density; this configuration has {self.densities}")
        return self.densities[0]

    def at(self, density: float) -> Config:
        """This configuration for one density."""
        return self.model_copy(update={"densities": [density]})

    def tree(self) -> dict[str, Any]:
        """Plain mappings, lists and scalars, as a YAML file would say them."""
        return self.model_dump(mode="json")


def pattern(structure: str) -> tuple[int, int]:
    """(n, m) of an `n:m` structure."""
    n, _, m = structure.partition(":")
    return int(n), int(m)
