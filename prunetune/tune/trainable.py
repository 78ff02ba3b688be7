"""The trainable class, whose methods Ray Tune calls."""

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
"""The version of the checkpoints' format."""
_DIVERGED = {"val_loss": math.inf, "train_loss": math.inf}
"""The losses in the last result of a trial that diverged, worse than those of any other network."""


class PipelineTrainable(tune.Trainable):  # type: ignore[misc]
    """A Ray Tune trainable that runs one configuration per trial, one epoch per step.

    `on` makes the class for the configuration that trials have in common.

    **Results.** Each result has `epoch` (from 1, over all stages), `stage`, `stage_epoch`, `density`, the
    epoch's metrics (`train_loss`, `val_loss`, the task's own, such as `val_accuracy` in [0, 1], and those of
    a mask, such as `mask_density`), `reused` (the epoch was in the store, or in the checkpoint from which the
    trial resumed), and in post-pruning `post_epoch`. The last result also has `done` and
    `PipelineResult.metrics`: `status` (complete, collapsed or diverged), `nonzero`, `epochs_run` and so on,
    and `test_accuracy` if the trial has finished all stages. The last metric of a diverged trial is the worst
    possible one (an accuracy of 0) and its losses are infinite, never NaN, so that every searcher accepts
    them.

    ASHA may compare trials by `training_iteration`, over all stages, or with `time_attr="post_epoch"` once
    they are pruned. Use a separate searcher and scheduler for each density, because accuracies at different
    densities cannot be compared.

    **Checkpoints.** Finished stages are in the store, where every trial finds them whose configuration is the
    same up to there. Of a running stage the store has only the newest epoch, which is deleted when the stage
    is finished. So Tune's checkpoint refers to the finished stages, and holds the epoch of the running stage,
    network and optimizers, for as long as Tune keeps it.

    **A checkpoint of another configuration**, which a trial gets when population based training exploits
    another trial, is resumed as far as possible:

    - The trial inherits finished stages. The running stage resumes from the checkpoint's weights, its curve
      and, for an optimizer of the same kind, its moments, with the new hyperparameters from there on. New
      hyperparameters of finished stages have no effect.
    - With another `density` or `pruning` section, a network that is already pruned is pruned again from the
      pre-pruned one, and post-pruning begins again.
    - If `pre_pruning` is switched on or off, nothing is inherited. If its `mask` is switched on or off, or
      has another method, pre-pruning begins again if it is running.
    - Other data or another model (except `data.batch_size` and `data.augmentation`) raise ConfigError.

    The result of such a trial differs from that of its configuration alone. It is stored under keys that
    contain what was inherited, so that no other trial reuses it by mistake.
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
        """Make the class to pass to `tune.Tuner`: its trials run `base` with a trial's parameters set in it.

        `base` is a YAML file's path, a mapping, or a Config. It may be a sweep's file; each of its
        distributions must then be replaced by a parameter. `storage`, a folder or URI that all nodes reach,
        replaces that of `base`. Relative paths are relative to this process's working folder.

        Parameters have dotted keys (`"pre_pruning.optimizer.lr"`) or are nested like the file; mappings are
        merged key by key. If a parameter sets a section to None, parameters below that section are ignored.
        `density` is short for `densities` with one entry. A trial asks for `resources.cpus` and
        `resources.gpus` of its configuration, unless `tune.with_resources` is used.

        Raises UserError where the file cannot be read, and ConfigError for mistakes in `base`. For a wrong
        parameter, `Tuner.fit` raises ConfigError when it makes the trial.
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
        # Fix the default of `storage` here: it may come from this process's environment, which workers lack.
        source = dataclasses.replace(source, tree={**source.tree, "storage": config.storage})
        settings = {"_base": source, "_folder": str(Path.cwd())}
        return type(cls.__name__, (cls,), {**settings, "__module__": cls.__module__, "__doc__": cls.__doc__})

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Return the resources that a trial asks of Ray; Tune calls this in the driver for every trial.

        Raises ConfigError for a wrong parameter. Distributions of the base are allowed here, because
        population based training sets its parameters later.
        """
        _, checked = sweep_from_document(cls._document(config))
        gpus = {"GPU": checked.resources.gpus} if checked.resources.gpus else {}
        return tune.PlacementGroupFactory([{"CPU": checked.resources.cpus, **gpus}])

    def setup(self, config: dict[str, Any]) -> None:
        """Prepare the process, and take a trial's parameters. Raises ConfigError for wrong parameters."""
        given = self.trial_resources.required_resources if self.trial_resources else {}
        prepare_process(max(1, int(given.get("CPU", 1))))
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Abandon the trial and take another one's parameters, so that Tune can reuse the process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Run one epoch, or read it from the store; the class documents what the result contains.

        Raises WorkError where an inherited stage is no longer in the store.
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
        """Write the names of the finished stages, and the epoch of the running stage, into a folder."""
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
        """Resume from a checkpoint, of this trial or of another one; the class documents how.

        Raises WorkError where the checkpoint is damaged or from another version, and ConfigError where its
        network or data are not those of this configuration.
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
        """Abandon the pipeline; finished stages stay in the store."""
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
        """Set up a configuration from its parameters, at its first epoch."""
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
        """Return the running pipeline; start it at first use, when a checkpoint, if any, has been loaded."""
        if self._run is None:
            storage = Store(self._config.storage)
            keys = {name: self._inheritance.stored_as(key) for name, key in self._keys.items()}
            # This record keeps a sweep's garbage collection from deleting the trial's stages.
            record = f"trained/{keys['post_pruning']}"
            storage.sub(self._config.name).write_record(record, {"keys": keys})
            stages = TrialStages(storage.sub("store"), self._inheritance, self._start)
            self._run = Run(self._config, stages, self._device, self.trial_id, skip=self._reported)
        return self._run


def _ended(result: PipelineResult) -> dict[str, Any]:
    """Return the values that only the last result of a trial has."""
    found = {name: value for name, value in result.metrics().items() if value is not None}
    del found["seconds"]  # Tune measures the time itself, also over restarts
    if result.status == "diverged":
        found |= {**_DIVERGED, result.metric.val: result.metric.worst}
    return {**found, "done": True}
