"""The learning rates that a method is known to bear, for the rules and their texts."""

from __future__ import annotations

from peft_study.config import METHODS
from peft_study.config.methods import LearningRates
from peft_study.doctor.diagnosis import Said
from peft_study.doctor.observations import UsedSettings


def rates_of(settings: UsedSettings) -> LearningRates | None:
    """Returns a method's rates; None where they are not known, or another optimizer than Adam is used."""
    optimizer = (settings.optimizer or "adam").lower()
    kind = METHODS.get(settings.method or "")
    return None if kind is None or "adam" not in optimizer else kind.learning_rates


def rates_said(settings: UsedSettings) -> Said:
    """Returns the range of a method as the end of a sentence; empty where it is not known."""
    rates = rates_of(settings)
    if rates is None:
        return Said("", "")
    name = (settings.method or "").replace("_", " ")
    return Said(
        f"; {name} is searched between {rates.low:g} and {rates.high:g}, {rates.default:g} is its usual rate",
        f"；{name} 的搜索范围是 {rates.low:g} 到 {rates.high:g}，常用 {rates.default:g}",
    )


def lower_rate(settings: UsedSettings) -> float | None:
    """Returns a lower rate to try: the method's usual one where the run's lies above it, else a third of the run's."""
    rates, rate = rates_of(settings), settings.learning_rate
    if rate is None:
        return rates.default if rates else None
    return rates.default if rates is not None and rate > 2 * rates.default else float(f"{rate / 3:.1g}")
