"""The untrained network, which is pruned at initialization, or to whose weights the pipeline rewinds."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, final

from prunetune import models
from prunetune.config.schema import InitializerConfig
from prunetune.engine.seeds import seed_of
from prunetune.stages.stage import Origin, Place, Stage, Step
from prunetune.stages.state import state_of
from prunetune.store import Artefact


@final
@dataclass(frozen=True)
class Initial(Stage):
    """The untrained network, made by its constructor and an initializer; `redrawn` uses another seed.

    It is never stored, because making it again is quicker than reading it.
    """

    origin: Origin
    initializer: InitializerConfig | None
    redrawn: bool = False

    is_stored: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The stage's name, `initial`."""
        return "initial"

    def run(self, place: Place) -> Generator[Step, None, Artefact]:
        """Make the network; yields nothing. The tensors are its parameters and buffers."""
        seed = seed_of(self.origin.seed, "redraw") if self.redrawn else None
        model = self.origin.build(place, seed)
        if self.initializer is not None:
            drawn = seed_of(self.origin.seed if seed is None else seed, "initializer")
            models.initialize(model, self.initializer, seed=drawn)
        yield from ()
        return Artefact(state_of(model), {"status": "complete"})
