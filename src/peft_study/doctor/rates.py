"""The learning rates that a method is known to bear, for the rules and their texts."""

from __future__ import annotations

from peft_study.config import METHODS
from peft_study.config.methods import LearningRates
from peft_study.doctor.diagnosis import Said
from peft_study.doctor.observations import UsedSettings

OTHER_RATES: dict[str, LearningRates] = {
    "p_tuning": LearningRates(1e-4, 1e-5, 1e-2),
    "multitask_prompt_tuning": LearningRates(0.1, 1e-3, 3.0),
    "ia3": LearningRates(3e-3, 1e-4, 0.1),
    "vera": LearningRates(1e-3, 1e-4, 0.1),
    "pvera": LearningRates(3e-3, 1e-4, 0.1),
    "adalora": LearningRates(5e-4, 1e-5, 1e-2),
    "loha": LearningRates(3e-4, 1e-5, 3e-2),
    "lokr": LearningRates(3e-3, 1e-5, 3e-2),
    "oft": LearningRates(3e-4, 1e-5, 1e-2),
    "boft": LearningRates(3e-4, 1e-5, 1e-2),
    "adaption_prompt": LearningRates(5e-3, 3e-4, 0.1),
    "fourierft": LearningRates(3e-2, 1e-3, 1.0),
    "unilora": LearningRates(5e-3, 1e-3, 0.3),
    "c3a": LearningRates(0.3, 1e-3, 3.0),
    "trainable_tokens": LearningRates(0.2, 1e-4, 3.0),
}
"""Methods that are not ours, for AdamW.

From huggingface/peft `method_comparison/` (63 runs on MetaMathQA, commit 5d602fdbf): the best rate of each method,
and a low end above the rates at which a run there ended at 1 % accuracy or less.
IA3 and prompts: T-Few; VeRA and AdaLoRA: their papers.
"""
_THROUGH_MLP = LearningRates(5e-5, 1e-5, 1e-2)
"""A prefix or prompt that an MLP makes: Li and Liang 2021 train it at 5e-5."""
_UNSCALED = ("prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning")
"""Methods that are trained by Adafactor without scaling by the weights, at Adam's rates (Lester et al. 2021: 0.3)."""
_NOT_ADAMS = ("galore", "apollo", "adamuon")
"""In names of optimizers that hold "adam" but take other rates."""


def rates_of(settings: UsedSettings) -> LearningRates | None:
    """Returns a method's rates; None where they are not known, or not for this optimizer."""
    optimizer, method = (settings.optimizer or "adam").lower(), settings.method or ""
    if not (
        ("adam" in optimizer and not any(name in optimizer for name in _NOT_ADAMS))
        or ("adafactor" in optimizer and method in _UNSCALED)
    ):
        return None
    if settings.projection:
        return _THROUGH_MLP
    kind = METHODS.get(method)
    rates = OTHER_RATES.get(method) if kind is None else kind.learning_rates
    return None if rates is None else rates.at(settings.tokens, settings.init)


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
