"""How many users there are at each moment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Spikes:
    """A few users all the time, and every `every_seconds` a burst of more that lasts `burst_seconds`.

    The last burst is over, and the baseline back, before `seconds` have passed.
    """

    seconds: float = 60.0
    users: int = 2
    burst_users: int = 8
    every_seconds: float = 20.0
    burst_seconds: float = 5.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Spikes:
        """`LOAD_SECONDS`, `LOAD_USERS`, …: the fields in capitals.  Raises ValueError that names a bad one."""
        given = {}
        for field in fields(cls):
            name = f"LOAD_{field.name.upper()}"
            if (value := environ.get(name)) is not None:
                try:
                    given[field.name] = type(field.default)(value)
                except ValueError:
                    raise ValueError(f"{name}={value!r} is not a number") from None
        return cls(**given)

    def users_at(self, second: float) -> int | None:
        """Users at this second; None at the end.  A burst ends each full period, so that a period begins calmly."""
        if second >= self.seconds:
            return None
        period = min(self.every_seconds, self.seconds)
        position = second % period
        lull = (period - self.burst_seconds) / 2
        in_burst = lull <= position < lull + self.burst_seconds
        return self.users + (self.burst_users if in_burst else 0)
