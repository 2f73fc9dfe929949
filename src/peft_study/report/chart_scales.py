"""What a chart shows of many numbers: the range of an axis, its ticks, and which of many curves and points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

_HEADROOM = 0.75
"""How far above the base an axis of losses reaches, in distances from the best loss to the base."""
_LEAST_SPAN = 0.05
"""Of the base's loss: an axis does not blow up differences that small."""
_MOST_TICKS = 8


@dataclass(frozen=True, slots=True)
class LossAxis:
    """An axis of losses, nats a token.

    Attributes:
        low, high: its ends.
        edge: where marks of losses above the axis are drawn, just inside it.
    """

    low: float
    high: float
    edge: float

    def beyond(self, loss: float) -> bool:
        """Returns whether a loss lies above the axis or is no number."""
        return not loss <= self.edge

    def place(self, loss: float) -> float:
        """Returns where a loss is drawn: a number inside the axis."""
        return self.edge if self.beyond(loss) else max(loss, self.low)


def loss_axis(losses: Iterable[float], base: float | None, ends: Iterable[float] = ()) -> LossAxis:
    """Returns an axis that shows the base and the losses that are as good, or not much worse.

    A loss of a trial that diverged may be a million times the others', which would all lie on the axis. So the axis
    ends above the base by three quarters of the distance from the best loss to the base.

    Args:
        losses: those drawn; NaN and infinity among them.
        base: the untouched base's, or None.
        ends: of intervals; they are shown as far as the axis may reach.
    """
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    middle = base if base is not None and math.isfinite(base) else statistics.median(finite) if finite else None
    if middle is None:
        return LossAxis(0.0, 1.0, 0.96)
    best = finite[0] if finite else middle
    span = max(abs(middle - best), _LEAST_SPAN * abs(middle), 1e-9)
    limit = max(middle, best) + _HEADROOM * span
    shown = [middle, *(loss for loss in finite if loss <= limit)]
    shown += [min(end, limit) for end in ends if math.isfinite(end)]
    low, high = min(shown), max(shown)
    pad = 0.06 * max(high - low, _LEAST_SPAN * abs(middle), 1e-9)
    room = pad if finite and len(finite) == sum(loss <= limit for loss in finite) else 2 * pad
    return LossAxis(max(low - pad, 0.0) if low >= 0 else low - pad, high + room, high + room - 0.7 * pad)


def log_ticks(low: float, high: float) -> list[float]:
    """Returns round values for a log axis: powers of ten, and some between them where the axis is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= _MOST_TICKS:
            return found if len(found) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]
    return found[:: math.ceil(len(found) / _MOST_TICKS)]


def spread(losses: Sequence[float], most: int) -> list[int]:
    """Returns which of many are drawn: half of them the best, half spread evenly over the rest; in their order.

    Args:
        losses: of each; NaN counts as worst.
        most: how many at most.
    """
    if len(losses) <= most:
        return list(range(len(losses)))
    ranked = sorted(range(len(losses)), key=lambda i: (not math.isfinite(losses[i]), losses[i]))
    best, rest = ranked[: most - most // 2], ranked[most - most // 2 :]
    wanted = most // 2
    return sorted(best + [rest[round(i * (len(rest) - 1) / max(wanted - 1, 1))] for i in range(wanted)])


def thinned(points: Sequence[_T], most: int) -> list[_T]:
    """Returns at most so many points of a curve, evenly spread; its first and last are among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
