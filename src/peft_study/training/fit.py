"""Whether training fits into memory: said from the model's configuration, before any weight is loaded.

at its peak = base + a row of the method + a trial
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peft_study.config import MethodConfig, ModelConfig, TrainingConfig
from peft_study.doctor.rules.costs import MARGIN
from peft_study.engine.engine import DEFAULT_ROW_TOKENS
from peft_study.engine.footprint import Footprint, count
from peft_study.engine.memory import available
from peft_study.errors import ModelError
from peft_study.methods.registry import is_exclusive
from peft_study.model.precision import choose
from peft_study.model.weightless import outline
from peft_study.statistics import size_text
from peft_study.training.session import Say

_UNCOUNTED = (RuntimeError, TypeError, AttributeError, ValueError, LookupError)
"""What a model's own code may raise on tensors that hold no numbers."""
_SHORTEST = 64
"""Tokens below which no lower `max_length` is offered, and the steps in which it is lowered."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Memory that training is expected to take, in bytes.

    Attributes:
        weights: of the base, by precision: as it will be loaded, as int8, as nf4.
        precision: the one it will be loaded in.
        row_tokens: tokens of a full row.
        max_length: most tokens of an example.
        free: what there is now; None where the system does not say.
        recompute: whether layers are computed again in the backward pass, or auto.
        plain, recomputed: what each method takes without that, and with it; the latter empty where it does not matter.
        quantizable: False where a method trains the base.
    """

    weights: Mapping[str, int]
    precision: str
    row_tokens: int
    max_length: int
    free: int | None
    recompute: bool | Literal["auto"]
    plain: Mapping[str, Footprint]
    recomputed: Mapping[str, Footprint]
    quantizable: bool = True

    @property
    def recomputes(self) -> bool:
        """True where layers are computed again; with auto, where an example of `max_length` does not fit without."""
        return self.recompute is True or (self.recompute == "auto" and self._most(self.plain) > self._room)

    @property
    def fits(self) -> bool:
        """True where every method fits with an example of `max_length` in a row."""
        return self._most(self._used) <= self._room

    def lines(self) -> list[str]:
        """Returns what the user should know, with the one change that makes it fit where it does not."""
        most, found = max(self._used.items(), key=lambda item: self._need(item[1]), default=(None, None))
        if found is None:
            return []
        tokens, base = max(self.row_tokens, self.max_length + found.virtual), self.weights[self.precision]
        free = "" if self.free is None else f" of {size_text(self.free)} that are free"
        again = " with layers computed again in the backward pass" if self.recomputes else ""
        said = (
            f"memory expected at the peak: {size_text(base + found.trial + found.row(tokens))}{free}: the base "
            f"{size_text(base)} in {self.precision}, a row of {tokens:,} tokens of {most} "
            f"{size_text(found.row(tokens))}{again}, a trial {size_text(found.trial)}"
        )
        if self.fits:
            cut = base + found.trial + found.row(tokens) > self._room
            return [said + (" (rows are cut)" if cut else "")]
        return [said, f"WARNING: {most} does not fit with examples of {self.max_length:,} tokens: {self.change()}"]

    def change(self) -> str:
        """Returns the one change that makes every method fit, the least first."""
        for words, fit in (
            ("set training.gradient_checkpointing: auto", dataclasses.replace(self, recompute="auto")),
            ("set model.quantization: nf4", dataclasses.replace(self, precision="nf4")),
        ):
            if fit.fits and (self.quantizable or fit.precision == self.precision):
                return f"{words} (then {size_text(fit._most(fit._used))})"
        base = self.weights[self.precision]
        tokens = (
            (self._room - base - found.trial - found.constant) / max(found.a_token, 1.0) - found.virtual
            for found in self._used.values()
        )
        length = int(min(tokens, default=0) // _SHORTEST) * _SHORTEST
        return "take a smaller base" if length < _SHORTEST else f"set data.max_length: {length}"

    def tell(self, say: Say) -> None:
        """Says what the user should know, and refuses what cannot be: a base that takes more than there is.

        Raises:
            ModelError: with the figures, and the one change that makes it fit.
        """
        for line in self.lines():
            say(line)
        weights = self.weights[self.precision]
        if self.free is not None and weights > self.free:
            what = f"the base takes {size_text(weights)} in {self.precision}, {size_text(self.free)} are free"
            raise ModelError(f"does not fit into the memory: {what}", remedy=self.change())

    @property
    def _room(self) -> float:
        return float("inf") if self.free is None else self.free * (1 - MARGIN)

    @property
    def _used(self) -> Mapping[str, Footprint]:
        return self.recomputed if self.recomputes else self.plain

    def _need(self, found: Footprint) -> int:
        """Returns the bytes at the peak of a row with one example of `max_length`, with one trial and the base."""
        return self.weights[self.precision] + found.trial + found.row(self.max_length + found.virtual)

    def _most(self, methods: Mapping[str, Footprint]) -> int:
        return max(map(self._need, methods.values()), default=0)


def expected_memory(
    model: ModelConfig,
    training: TrainingConfig,
    methods: Mapping[str, MethodConfig],
    max_length: int | None,
    *,
    both: bool = False,
    sharing: int = 1,
) -> Fit | None:
    """Returns the memory that training is expected to take; nothing is loaded.

    Args:
        model, training: as configured.
        methods: the largest setting of each, by name; what trains nothing is left out, and what does not fit the model.
        max_length: most tokens of an example; None: not limited, and taken to be a full row.
        both: with and without layers computed again, even where the first does not matter.
        sharing: workers that share the memory of this machine's CPU.

    Returns:
        None for a model whose operations cannot be counted without its weights, as those of a mixture of experts; and,
        unless `both` is asked for, for one that is so small that the count would take longer than it is worth.

    Raises:
        ModelError: when there is no configuration of a model.
    """
    placement = choose(model.device, model.dtype)
    base = outline(model.name, placement, revision=model.revision, trust_remote_code=model.trust_remote_code)
    trained = {name: method for name, method in methods.items() if method.method != "none"}
    row_tokens = training.row_tokens or DEFAULT_ROW_TOKENS[placement.device.type]
    try:
        free = available(placement.device)
    except (RuntimeError, AssertionError):  # a card that cannot be used: loading says why
        free = None
    if free is not None and placement.device.type == "cpu":
        free //= sharing
    try:
        largest = _at_most(base.config.get_text_config(), max(row_tokens, max_length or 0))
        if not both and free is not None and largest < free / 10:
            return None
        plain, recomputed = count(base, trained, recompute=False), dict[str, Footprint]()
        found = Fit(
            plain.weights,
            model.quantization or base.precision,
            row_tokens,
            max_length or row_tokens,
            free,
            training.gradient_checkpointing,
            plain.methods,
            recomputed,
            quantizable=not any(is_exclusive(method.method) for method in trained.values()),
        )
        if both or found.recomputes or not found.fits:
            recomputed |= count(base, trained, recompute=True).methods
    except _UNCOUNTED as error:
        logging.getLogger(__name__).info("no memory is expected for %s: %s", model.name, error)
        return None
    return found


def _at_most(text: Any, tokens: int) -> float:
    """Returns bytes that no base of this configuration and no row of so many tokens come near, in float32."""
    hidden, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    weights = 2 * text.vocab_size * hidden + layers * hidden * (4 * hidden + 3 * inner)
    return 4.0 * (weights + tokens * layers * 64 * (hidden + inner))
