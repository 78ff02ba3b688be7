"""The trainable itself: what Tune calls, and when."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import ray
from ray import tune

from prunetune import data as datasets
from prunetune.config import document
from prunetune.config.document import Document
from prunetune.config.reading import from_document, sweep_from_document
from prunetune.config.schema import Config
from prunetune.engine.precision import prepare_process
from prunetune.errors import UserError, WorkError
from prunetune.pipeline import PipelineResult
from prunetune.stages.plan import plan
from prunetune.store import Store
from prunetune.tune.inheritance import Inheritance, Position, UnderWay, gone_on_from
from prunetune.tune.parameters import HERE, flat, over
from prunetune.tune.run import Run
from prunetune.tune.stages import TrialStages

_FORMAT = 1
"""Of checkpoints."""
_DIVERGED = {"val_loss": math.inf, "train_loss": math.inf}
"""The last losses of a trial that diverged: worse than any network that gives an answer."""


class PipelineTrainable(tune.Trainable):  # type: ignore[misc]
    """One configuration per trial, one epoch per step; `on` says what trials have in common.

    **Results.** Each has `epoch` (from 1, over all stages), `stage`, `stage_epoch`, `density`, the epoch's
    metrics (`train_loss`, `val_loss`, the task's own, such as `val_accuracy` in [0, 1], and what a mask
    measures of itself, such as `mask_density`), `reused` (the epoch was in the store, or in the checkpoint
    that the trial went on from), and in post-pruning `post_epoch`. With the last epoch come `done` and
    `PipelineResult.metrics`: `status` (complete, collapsed or diverged), `nonzero`, `epochs_run` and so on,
    and `test_accuracy` of a trial that got to its end. A diverged trial's last metric is the worst there is
    (an accuracy of 0) and its losses are infinite, never NaN, so that every searcher can be told.

    ASHA may compare trials by `training_iteration`, over all stages, or with `time_attr="post_epoch"` once
    they are pruned. Give trials of several densities to searchers and schedulers of their own: their
    accuracies say nothing about each other.

    **Checkpoints.** A finished stage is in the store, where all trials find it whose configuration says the
    same up to there. Of the stage under way the store has only the newest epoch, and nothing once it is
    finished; so Tune's checkpoint refers to the finished stages and holds the epoch of the stage under way,
    network and optimizers, for as long as Tune keeps it.

    **A checkpoint under another configuration**, as when population based training exploits a trial, is
    gone on from as far as it can be:

    - Finished stages are taken over, and the stage under way goes on from the checkpoint's weights, its
      curve and, for an optimizer of the same kind, its moments, with the new hyperparameters from there.
      Hyperparameters of stages that are finished come too late to have an effect.
    - With another `density` or `pruning` section a network that is already pruned is pruned anew, from the
      pre-pruned one, and its post-pruning begins again.
    - Where `pre_pruning` is switched on or off nothing is taken over; where its `mask` is, or has another
      method, the stage begins again if it is under way.
    - Other data or another model (but for `data.batch_size` and `data.augmentation`) are a ConfigError.

    What comes of it is not what the configuration gives by itself. It is stored under keys that contain what
    was taken over, so that nobody takes it for that.
    """

    _base: ClassVar[Document | None] = None
    _folder: ClassVar[str] = ""
    _device: str
    _source: Document
    _config: Config
    _keys: dict[str, str]
    _inheritance: Inheritance
    _start: UnderWay | None
    _reported: int
    _run: Run | None = None

    @classmethod
    def on(
        cls, base: Config | str | Path | Mapping[str, Any], *, storage: str | Path | None = None
    ) -> type[Self]:
        """The class to give to a `tune.Tuner`: trials of `base`, with a trial's parameters over it.

        `base` is a YAML file's path, a mapping, or a Config. It may be a sweep's file; each of its
        distributions must then be replaced by a parameter. `storage`, a folder or URI that all nodes reach,
        replaces the one of `base`. Relative paths are relative to this process' folder.

        Parameters have dotted keys (`"pre_pruning.optimizer.lr"`) or are nested as the file is; mappings are
        merged key by key. A section that a parameter sets to None is off, whatever parameters are below it.
        `density` is short for `densities` with one entry. What a trial asks for is `resources.cpus` and
        `resources.gpus` of its configuration, unless `tune.with_resources` says otherwise.

        Raises UserError where the file cannot be read, and ConfigError for what is wrong with `base`. A wrong
        parameter is a ConfigError that `Tuner.fit` raises when it makes the trial.
        """
        if isinstance(base, str | Path):
            source = document.read(base)
        elif isinstance(base, Config):
            source = Document("the base configuration", base.tree())
        else:
            source = Document("the base configuration", copy.deepcopy(dict(base)))
        if storage is not None:
            source = over(source, {"storage": str(storage)}, "storage")
        _, config = sweep_from_document(source)
        # The default is in this process' environment, not in the workers'.
        source = dataclasses.replace(source, tree={**source.tree, "storage": config.storage})
        settings = {"_base": source, "_folder": str(Path.cwd())}
        return type(cls.__name__, (cls,), {**settings, "__module__": cls.__module__, "__doc__": cls.__doc__})

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What a trial asks Ray for; Tune calls it in the driver, for every trial that it makes.

        Raises ConfigError for a wrong parameter. A distribution of the base may still be there: population
        based training sets its parameters later.
        """
        _, checked = sweep_from_document(cls._document(config))
        gpus = {"GPU": checked.resources.gpus} if checked.resources.gpus else {}
        return tune.PlacementGroupFactory([{"CPU": checked.resources.cpus, **gpus}])

    def setup(self, config: dict[str, Any]) -> None:
        """Take a trial's parameters. Raises ConfigError for what is wrong with them."""
        given = self.trial_resources.required_resources if self.trial_resources else {}
        prepare_process(max(1, int(given.get("CPU", 1))))
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same process runs another trial from now on (`reuse_actors`)."""
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One epoch, trained now or found in the store; the class says what is in the result.

        Raises WorkError where a stage that was taken over is in the store no more.
        """
        run = self._running()
        report = run.epoch()
        if report is not None:
            self._reported += 1
        result = {"density": self._config.density, **(report or run.last)}
        if run.end is not None and not run.has_more:
            result |= _ended(run.end)
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write what names the finished stages, and the epoch of the stage under way, into a folder."""
        stages = self._running().stages
        names = {key: name for name, key in self._keys.items()}
        epoch = stages.under_way
        position = Position(
            config=self._config.tree(),
            keys=self._keys,
            finished=[name for name, key in self._keys.items() if key in stages.finished],
            under_way=names[epoch.key] if epoch is not None else None,
            reported=self._reported,
            mark=stages.inheritance.mark,
            taken=dict(stages.inheritance.taken),
        )
        folder = Store(checkpoint_dir)
        if epoch is not None:
            folder.save("checkpoints", "epoch", epoch.tensors, epoch.meta)
        folder.write_record("trial", {"format": _FORMAT, **dataclasses.asdict(position)})

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from a checkpoint, of this trial or of another; the class says how.

        Raises WorkError where the checkpoint is damaged or an other version's, and ConfigError where its
        network cannot be this configuration's.
        """
        folder = Store(checkpoint_dir)
        body = folder.read_record("trial")
        if not isinstance(body, dict) or body.pop("format", None) != _FORMAT:
            raise WorkError(f"{checkpoint_dir}: is damaged, or no checkpoint of this version of prunetune")
        position = Position(**body)
        epoch = None
        if position.under_way is not None:
            found = folder.load("checkpoints", "epoch")
            if found is None:
                raise WorkError(f"{checkpoint_dir}: its epoch is missing or damaged")
            epoch = UnderWay(position.keys[position.under_way], found.tensors, found.meta)
        self.cleanup()
        self._inheritance, self._start = gone_on_from(position, epoch, self._config, self._keys, self._source)
        self._reported = position.reported

    def cleanup(self) -> None:
        """Let go of the pipeline; what is finished of it is in the store."""
        if self._run is not None:
            self._run.close()
            self._run = None

    @classmethod
    def _document(cls, parameters: Mapping[str, Any]) -> Document:
        if cls._base is None:
            raise UserError(
                "PipelineTrainable: give tune.Tuner what PipelineTrainable.on(configuration) gives"
            )
        return over(cls._base, flat(parameters), HERE)

    def _begin(self, parameters: Mapping[str, Any]) -> None:
        """Another configuration, from its start."""
        self._run = None
        self._source = self._document(parameters)
        config = from_document(self._source)
        data = config.data.model_copy(update={"root": self._absolute(config.data.root)})
        self._config = config.model_copy(update={"data": data, "storage": self._absolute(config.storage)})
        self._keys = plan(self._config, datasets.load(data, self._device).digest).keys
        self._inheritance = Inheritance()
        self._start = None
        self._reported = 0

    def _absolute(self, path: str) -> str:
        return path if "://" in path else str(Path(self._folder, Path(path).expanduser()))

    def _running(self) -> Run:
        """The pipeline; it is begun when it is known whether there is a checkpoint to go on from."""
        if self._run is None:
            storage = Store(self._config.storage)
            keys = {name: self._inheritance.stored_as(key) for name, key in self._keys.items()}
            # So that nobody who clears the store takes the trial's stages for garbage.
            record = f"trained/{keys['post_pruning']}"
            storage.sub(self._config.name).write_record(record, {"keys": keys})
            stages = TrialStages(storage.sub("store"), self._inheritance, self._start)
            self._run = Run(self._config, stages, self._device, self.trial_id, skip=self._reported)
        return self._run


def _ended(result: PipelineResult) -> dict[str, Any]:
    """What the last result of a trial has beside an epoch's."""
    found = {name: value for name, value in result.metrics().items() if value is not None}
    del found["seconds"]  # Tune counts them over restarts, too
    if result.status == "diverged":
        found |= {**_DIVERGED, result.metric.val: result.metric.worst}
    return {**found, "done": True}
