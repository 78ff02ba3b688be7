"""The trackers that are built in, by the name in `tracking.trackers`."""

from __future__ import annotations

from prunetune.trackers.tracker import Sweep, Tracker


def mlflow(sweep: Sweep) -> Tracker:
    """A parent run for the sweep and a nested run per trial, where `tracking` says.

    Raises UserError where MLflow knows no such kind of place.
    """
    from prunetune.trackers.mlflow import experiments, tracker  # takes seconds, and a file is read without it

    place = experiments.place(sweep.config)
    experiments.check(place)
    return tracker.Tracker(place, sweep.id, sweep.name)
