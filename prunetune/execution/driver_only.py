"""A base class for objects that Ray Tune holds in the driver and must not pickle or copy."""

from __future__ import annotations

from typing import Any, Self


class DriverOnly:
    """A base class whose objects pickle as empty and whose copies are the object itself.

    Tune pickles every object that it is given, so that a Tuner can be restored. Here a sweep is resumed from
    the store and never from such a pickle, and these objects hold threads and a database connection, which
    cannot be pickled.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
