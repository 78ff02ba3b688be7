"""For objects that Ray Tune holds in the driver."""

from __future__ import annotations

from typing import Any, Self


class DriverOnly:
    """Pickles to an empty object, and copies to itself.

    Tune pickles all that it is given, so that a Tuner could be restored from the pickle. Nothing is ever
    restored that way here (the store is the truth), and what these objects hold, threads and a database
    connection, cannot be pickled.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
