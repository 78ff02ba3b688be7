"""Functions that make the built-in trackers, by their names in `tracking.trackers`."""

from __future__ import annotations

from prunetune.trackers.tracker import Sweep, Tracker


def mlflow(sweep: Sweep) -> Tracker:
    """Make the MLflow tracker: a parent run for the sweep, a nested run per trial, as `tracking` configures.

    Raises UserError where MLflow cannot handle the configured kind of tracking URI.
    """
    # Imported here because it takes seconds, and reading a sweep's file does not need it.
    from prunetune.trackers.mlflow import experiments, tracker

    place = experiments.place(sweep.config)
    experiments.check(place)
    return tracker.Tracker(place, sweep.id, sweep.name)
