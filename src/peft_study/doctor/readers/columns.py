"""What the columns of a log hold, by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft_study.errors import UserError, nearest

_HELD_OUT = ("eval", "val", "valid", "validation", "held_out", "heldout", "evaluation", "dev", "test")
_LOSS = (
    "loss", "loss_step", "ce_loss", "cross_entropy_loss", "cross_entropy", "ce", "lm_loss", "nll_loss", "nll",
    "sft_loss", "language_model_loss", "loss_ce", "loss_nll", "xent", "token_loss", "main_loss", "total_loss",
    "loss_total", "avg_loss", "mean_loss", "loss_avg", "loss_mean", "average_loss", "loss_epoch", "running_loss",
    "smoothed_loss", "loss_smoothed", "epoch_loss", "batch_loss",
)  # fmt: skip
_STEP = (
    "global_step", "trainer_global_step", "optimizer_step", "step", "steps", "global_steps", "iteration", "iter",
    "iterations", "current_steps", "global_iter", "global_iteration", "num_updates", "update", "updates", "n_iter",
    "it", "batch", "i", "_step",
)  # fmt: skip
_NORM = (
    "grad_norm", "gradient_norm", "gradnorm", "gnorm", "gn", "global_grad_norm", "total_grad_norm", "grad_norm_total",
    "grad_l2_norm", "l2_grad_norm", "total_norm", "norm",
)  # fmt: skip
_NAMES: dict[str, tuple[str, ...]] = {
    "step": _STEP,
    "epoch": ("epoch", "epochs", "ep"),
    "rate": ("learning_rate", "lr", "learningrate", "rate"),
    "gradient_norm": _NORM,
    "loss_scale": ("loss_scale", "grad_scale", "scaler_scale", "loss_scaler", "scale"),
    "minus_base": ("loss_minus_base", "minus_base"),
    "loss": (*_LOSS, "value"),
    "accuracy": ("accuracy", "acc", "exact_match"),
}
_HELD_OUT_NAMES: dict[str, tuple[str, ...]] = {
    "held_out_loss": ("", *_LOSS),
    "held_out_minus_base": ("minus_base", "loss_minus_base"),
    "held_out_low": ("minus_base_low",),
    "held_out_high": ("minus_base_high",),
    "accuracy": _NAMES["accuracy"],
    "step": _STEP,
    "epoch": _NAMES["epoch"],
}
_NO_SOURCE = {"low", "high", "std", "min", "max", "aux", "kl", "reg", "scale", "minus_base", "best", "reduced"}
SOURCE = "source "
"""Begins what a column with the held-out loss of one source holds."""
_GIVEN = {
    **{name: name for name in (*_NAMES, "held_out_loss")},
    "learning_rate": "rate",
    "lr": "rate",
    "grad_norm": "gradient_norm",
    "held_out": "held_out_loss",
    "eval_loss": "held_out_loss",
    "val_loss": "held_out_loss",
}
_AROUND = "metrics|data|logs?|history|values|scalars|summary|stats|trainer"
"""Names of objects around the values, which say nothing."""
KIND_COLUMNS = frozenset({"event", "split", "phase", "mode", "stage", "subset"})
"""Names of columns that say whether a row is of the training or of an evaluation."""


def plain(name: str) -> str:
    """Returns a name in one spelling: ``train/Loss`` and ``train loss`` are train_loss."""
    name = name.rpartition(" - ")[2] if " - " in name else name  # a chart that wandb exports: RUN - train/loss
    return re.sub(r"[\W]+", "_", name.strip().lower()).rstrip("_")


def meaning(name: str, *, held_out: bool = False) -> tuple[str, int] | None:
    """Returns what a column holds and how sure that is, 0 being the surest; None where nothing is known of it.

    Args:
        name: of the column.
        held_out: the row says that it is of an evaluation.
    """
    words = re.sub(rf"^({_AROUND})_", "", plain(name))
    if words.endswith(("__min", "__max")):
        return None
    kinds = "|".join(_HELD_OUT)
    match = re.fullmatch(rf"(?:({kinds})(?:_(.*))?|(.+)_({kinds}))", words)
    if match or held_out:
        split, rest = (match[1] or match[4], (match[2] or "") if match[1] else match[3]) if match else ("eval", words)
        return _held_out_meaning(split, re.sub(r"^(train|training)_", "", rest))
    rest = re.sub(r"^(train|training|trn)_|_(train|training)$", "", words)
    for what, names in _NAMES.items():
        if rest in names and not (what == "accuracy" and rest != words):
            return what, names.index(rest)
    if re.fullmatch(r"(lr|learning_rate)_.*", rest) and "scheduler" not in rest:
        return "rate", 9
    return None


def _held_out_meaning(split: str, rest: str) -> tuple[str, int] | None:
    for what, names in _HELD_OUT_NAMES.items():
        if rest in names:
            return what, 20 * _HELD_OUT.index(split) + names.index(rest)
    match = re.fullmatch(r"(.+)_loss|loss_(.+)", rest)
    source = (match[1] or match[2]) if match else None
    if source is None or source in _NO_SOURCE or source.rpartition("_")[2] in _NO_SOURCE:
        return None
    return SOURCE + source, _HELD_OUT.index(split)


def of_evaluation(row: Mapping[str, Any]) -> bool:
    """Returns whether a row says in a column of its own, such as ``split``, that it is of an evaluation."""
    return any(isinstance(row.get(name), str) and plain(row[name]) in _HELD_OUT for name in KIND_COLUMNS)


class Columns:
    """Chooses a column for each thing.

    Args:
        given: names of columns by what they hold, as ``{"loss": "my_loss"}``; all others are guessed.

    Attributes:
        names: of all columns.

    Raises:
        UserError: when something is asked for that no column can hold.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self.names: list[str] = []
        self._given: dict[str, str] = {}
        for what, name in (given or {}).items():
            if what not in _GIVEN and not what.startswith(SOURCE):
                raise UserError(f"{what} is nothing that a log holds", where="--map", remedy=nearest(what, _GIVEN))
            self._given[name] = _GIVEN.get(what, what)
        self._chosen: dict[tuple[str, bool], str | None] = {}
        self._taken: dict[str, str] = {what: name for name, what in self._given.items()}
        self._others: dict[str, list[str]] = {}

    @property
    def chosen(self) -> dict[str, str]:
        """Names of columns by what they hold."""
        return dict(self._taken)

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Chooses by the first rows: of several columns the surest one that is not much emptier than the others."""
        counts: Counter[tuple[str, bool]] = Counter()
        for row in rows:
            held_out = of_evaluation(row)
            self.names += [name for name in row if name not in self.names]
            counts.update((name, held_out) for name, value in row.items() if value not in (None, ""))
        offers: dict[str, list[tuple[int, str, bool]]] = {}
        for name, held_out in counts:
            if name not in self._given and (known := meaning(name, held_out=held_out)) is not None:
                offers.setdefault(known[0], []).append((known[1], name, held_out))
        for what, found in offers.items():
            if what in self._given.values():
                continue
            most = max(counts[name, held_out] for _, name, held_out in found)
            _, name, held_out = min(each for each in found if 2 * counts[each[1:]] >= most)
            self._taken[what] = name
            self._chosen[name, held_out] = what
            self._others[what] = [other for _, other, _ in sorted(found) if other != name]
            if what in ("step", "epoch"):
                self._chosen[name, not held_out] = what

    def of(self, name: str, held_out: bool) -> str | None:
        """Returns what a column is read for; None where it is not read.

        Args:
            name: of the column.
            held_out: the row is of an evaluation.
        """
        key = (name, held_out)
        if key not in self._chosen:
            if name not in self.names:
                self.names.append(name)
            known = meaning(name, held_out=held_out)
            what = self._given.get(name) or (known[0] if known else None)
            if name not in self._given and (what in self._given.values() or self._taken.get(what or "", name) != name):
                what = None
            if what is not None:
                self._taken[what] = name
            self._chosen[key] = what
        return self._chosen[key]

    def check(self, where: str) -> None:
        """Refuses names of columns that the log does not have.

        Raises:
            UserError: there is no such column.
        """
        for name, what in self._given.items():
            if name not in self.names:
                raise UserError(f"has no column {name!r} for {what}", where=where, remedy=nearest(name, self.names))

    def said(self) -> list[str]:
        """Returns what was guessed, in a line; and a line for each choice among several."""
        guessed = {what: name for what, name in self._taken.items() if name not in self._given}
        lines = []
        if guessed:
            lines.append("columns guessed: " + ", ".join(f"{what} read from {name}" for what, name in guessed.items()))
        lines += [
            f"{what} is read from {guessed[what]}, not from {', '.join(others[:4])}"
            for what, others in self._others.items()
            if others and what in guessed and what in ("loss", "held_out_loss", "rate")
        ]
        return lines
