"""All trackers of a sweep as one object; an error in one of them does not stop the sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, final

from prunetune.config.schema import TrackerConfig
from prunetune.engine.epoch import Epoch
from prunetune.errors import UserError
from prunetune.records.trial import TrialRecord
from prunetune.trackers.tracker import Sweep, Tracker

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Closed:
    """A closed tracker: its title, how to view what it wrote ("" if unknown), how many writes failed."""

    title: str
    look: str
    unwritten: int


@final
@dataclass
class _Member:
    name: str
    tracker: Tracker
    failures: int = field(default=0)

    title: str = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.title = str(getattr(self.tracker, "title", self.name))
        except Exception:  # told under the name that the file gives it
            self.title = self.name


@final
class Trackers:
    """Passes every call on to all trackers; exceptions of a tracker are counted, and the first is logged.

    A tracker that has raised still gets the next calls, because its problem may be temporary.
    """

    def __init__(self, trackers: Sequence[tuple[str, Tracker]]) -> None:
        """`trackers` are pairs of the name in the sweep's file and the tracker."""
        self._members = [_Member(name, tracker) for name, tracker in trackers]

    @classmethod
    def of(cls, sweep: Sweep) -> Trackers:
        """Make the trackers that `tracking.trackers` names. Raises UserError where one cannot be made."""
        made = cls([])
        try:
            for index, section in enumerate(sweep.config.tracking.trackers):
                made._members.append(_Member(section.name, _make(sweep, section, index)))
        except UserError:
            made.close()  # those before it may have begun to write
            raise
        return made

    @property
    def run_ids(self) -> dict[str, str]:
        """What the first tracker that has such calls each trial, by the trial's uid."""
        for member in self._members:
            found: dict[str, str] | None = self._guarded(
                member, "run_ids", partial(_attribute, member.tracker, "run_ids", dict)
            )
            if found:
                return found
        return {}

    def begin(self, file: dict[str, Any], records: Sequence[TrialRecord]) -> None:
        """Call `Tracker.begin` of each tracker."""
        self._tell("begin", file, records)

    def started(self, record: TrialRecord) -> None:
        """Call `Listener.started` of each tracker."""
        self._tell("started", record)

    def epochs(self, record: TrialRecord, epochs: list[Epoch]) -> None:
        """Call `Listener.epochs` of each tracker."""
        self._tell("epochs", record, epochs)

    def ended(self, record: TrialRecord) -> None:
        """Call `Listener.ended` of each tracker."""
        self._tell("ended", record)

    def finish(self, status: str, summary: Mapping[str, float], files: Mapping[str, str]) -> None:
        """Call `Tracker.finish` of each tracker."""
        self._tell("finish", status, summary, files)

    def close(self) -> list[Closed]:
        """Close each tracker; return its title, how to view what it wrote, and how many writes failed."""
        return [self._close(member) for member in self._members]

    def _close(self, member: _Member) -> Closed:
        unwritten = self._guarded(member, "close", lambda: int(member.tracker.close() or 0))
        look = self._guarded(member, "look", partial(_attribute, member.tracker, "look", str))
        return Closed(member.title, look or "", (unwritten or 0) + member.failures)

    def _tell(self, event: str, *given: Any) -> None:
        for member in self._members:
            self._guarded(member, event, partial(_call, member.tracker, event, given))

    def _guarded(self, member: _Member, event: str, call: Callable[[], _T]) -> _T | None:
        try:
            return call()
        except Exception as error:  # a tracker's error must not stop the sweep
            if not member.failures:
                logger.warning(
                    "tracking.trackers: %s: %s: %s: %s (said once; the sweep goes on)",
                    member.title,
                    event,
                    type(error).__name__,
                    error,
                    exc_info=logger.isEnabledFor(logging.DEBUG),
                )
            member.failures += 1
            return None


def _call(tracker: Tracker, event: str, given: Sequence[Any]) -> None:
    getattr(tracker, event)(*given)


def _attribute(tracker: Tracker, name: str, kind: Callable[[Any], _T]) -> _T | None:
    """What a tracker has under a name, as this kind; None where it has nothing."""
    value = getattr(tracker, name, None)
    return None if value is None else kind(value)


def _make(sweep: Sweep, section: TrackerConfig, index: int) -> Tracker:
    try:
        tracker: Tracker = section.component(sweep, **section.options)
    except UserError:
        raise
    except Exception as error:  # raised before the first trial, when nothing is lost yet
        raise UserError(
            f"tracking.trackers.{index} = {section.name!r}: cannot be made: {type(error).__name__}: {error}"
        ) from error
    return tracker
