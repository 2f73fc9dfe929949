"""Finds the adapter of a run, and merges one into its base, with the loss that the merge costs.

    base + adapter ── losses of the run's held-out rows ──┐
          │ merge in float32                              ├──► MergeLosses: learned, and lost by the merge
          ▼ save, float32 or rounded                      │
    merged folder ──── losses of the same rows ───────────┘

Of the three models, one is in memory at a time.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from peft_study.config import TrainConfig, validate
from peft_study.data.dataset import Rows
from peft_study.engine.engine import Engine
from peft_study.errors import ConfigError, ModelError, OutputError, UserError
from peft_study.evaluation.generation import find_base, is_whole_model, load_adapter_base, put_on
from peft_study.methods.peft_files import encoding, note_encoding, read_config
from peft_study.methods.peft_format import load_adapter
from peft_study.methods.reference import NoAdapter
from peft_study.model.load import load_base
from peft_study.model.precision import Placement, choose
from peft_study.statistics import Estimate, Losses, difference, loss_value
from peft_study.storage.files import atomic_folder, follow_umask
from peft_study.storage.run_dir import RunFolder
from peft_study.training.session import Say, describe, open_session, timed

SOFT = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")
ROUNDING = 1e-4
"""Share of the loss: smaller differences come from the order of sums, in float32 as well."""


@dataclass(frozen=True, slots=True)
class MergeLosses:
    """Held-out losses in nats a token.

    Attributes:
        base, adapter: of the untouched base and with the adapter on it, in the precision of the run.
        merged: of the merged model, in the precision of its files.
        above: the merged model's minus the adapter's, paired by example.
        examples: number of examples measured.
    """

    base: float
    adapter: float
    merged: float
    above: Estimate
    examples: int

    @property
    def lost(self) -> float | None:
        """Share of the learned improvement that the merge lost; None where it lost no more than noise."""
        if self.above.low <= ROUNDING * self.adapter:
            return None
        learned = self.base - self.adapter
        return min(1.0, self.above.value / learned) if learned > 0 else 1.0


class _HeldOut(NamedTuple):
    """Held-out rows of a run, the base's and the adapter's summed loss of each, and tokens a packed row."""

    rows: Rows
    base_N: Losses
    adapter_N: Losses
    row_tokens: int | None


def merge(
    adapter: Path,
    output: Path,
    say: Say,
    *,
    base: str | None = None,
    dtype: str = "float32",
    measure: bool = True,
    device: str = "auto",
) -> MergeLosses | None:
    """Writes the base with a LoRA adapter merged in, as a model folder with the tokenizer and template of the training.

    The sum is made in float32, and written so unless another dtype is asked for: rounded to bfloat16, a weight keeps 8
    bits, and an update below 1/512 of a weight, which is most of what a short LoRA run learns, is gone. A base that was
    quantised in training is dequantised, because the adapter was fitted to the values of its codes.

    Args:
        adapter: folder of the adapter.
        output: of the merged model; empty or not there.
        say: receives each step that takes time, and a line where nothing is measured.
        base: model to merge into instead of the one that the adapter names.
        dtype: of the weights that are written: float32, bfloat16 or float16.
        measure: measure the losses of the run's held-out rows before and after.
        device: for the measurement; the merge itself runs on the CPU.

    Returns:
        The losses; None where they were not asked for, or the run's rows are not available.

    Raises:
        ModelError: for soft prompts, which change no weights; for a model that was trained as a whole; when base or
            adapter cannot be loaded.
        ConfigError: when the device or the dtype is unknown.
        OutputError: when the folder holds something or cannot be written.
    """
    _check(adapter, output)
    place, precision = choose(device).device, choose("cpu", dtype).dtype
    held_out = _before(adapter, base, device, say) if measure else None
    gc.collect()  # the engine refers to itself: without this, its model would stay beside the next one
    with timed(say, f"merging in float32, writing {dtype}"):
        _write(adapter, output, base, precision, say)
    return None if held_out is None else _after(output, held_out, Placement(place, precision), say)


def _check(adapter: Path, output: Path) -> None:
    """Refuses an adapter that cannot be merged, before anything is loaded."""
    if is_whole_model(adapter):
        raise ModelError("is a whole model: there is nothing to merge", where=str(adapter), remedy="use it as it is")
    kind = str(read_config(adapter).get("peft_type"))
    if kind in SOFT:
        raise ModelError(
            f"{kind.lower().replace('_', ' ')} cannot be merged: it changes no weights",
            where=str(adapter),
            remedy="serve it beside the base: peft.PeftModel.from_pretrained(base, adapter), or peft-study chat",
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError("is not an empty folder", where=str(output), remedy="give another -o")


def _write(adapter: Path, output: Path, base: str | None, precision: torch.dtype, say: Say) -> None:
    loaded = load_adapter_base(adapter, base, Placement(torch.device("cpu"), torch.float32))
    if loaded.quantization:
        say(f"the base was quantised ({loaded.quantization}) in training: it is dequantised before the update is added")
        loaded = loaded._replace(model=loaded.model.dequantize())
    merged = put_on(adapter, loaded).merge_and_unload().to(precision)
    kept = encoding(adapter)
    template = (
        loaded.tokenizer.chat_template
        if kept["template"] is None
        else Path(kept["template"]).read_text(encoding="utf-8")
    )
    with atomic_folder(output) as place:
        merged.save_pretrained(place)
        follow_umask(place)
        loaded.tokenizer.save_pretrained(place)
        if isinstance(template, str):
            note_encoding(place, template, add_bos=kept["add_bos"])


def _before(adapter: Path, base: str | None, device: str, say: Say) -> _HeldOut | None:
    """Returns the held-out rows of the adapter's run with their losses; None, with a line, where there are none."""
    run = RunFolder(adapter.resolve().parent)
    try:
        values = run.read_if_there("config.resolved.json")
        if values is None:
            raise ConfigError(f"no settings of a run lie beside the adapter ({run.path / 'config.resolved.json'})")
        config = validate(TrainConfig, values, where=str(run.path / "config.resolved.json"))
        model = config.model.model_copy(update={"name": find_base(adapter, base), "device": device})
        # a trial's record is its study's: STUDY/trials/NAME, STUDY/reruns/NAME
        record = run.record() or RunFolder(run.path.parent.parent).record() or {"data": {}}
        test = record["data"].get("test_rows") is not None
        session = open_session(model, config.data, config.training, say, test=test)
        if record["data"].get("held_out_digest") not in (None, describe(session)["data"]["held_out_digest"]):
            raise ConfigError("the held-out rows are no longer those of the run")
        everything = range(len(session.held_out))
        with timed(say, f"measuring {len(everything)} held-out rows"):
            (adapter_N,) = session.engine.losses([load_adapter(adapter, session.base)], session.held_out, everything)
            base_N = session.base_held_out.of(everything)
    except UserError as error:
        say(f"not measured: {error}")
        return None
    return _HeldOut(session.held_out, base_N, adapter_N, config.training.row_tokens)


def _after(output: Path, held_out: _HeldOut, placement: Placement, say: Say) -> MergeLosses | None:
    """Returns the losses with the merged model's beside them."""
    rows, base_N, adapter_N, row_tokens = held_out
    try:
        with timed(say, "measuring the merged model"):
            engine = Engine(load_base(str(output), placement=placement), row_tokens=row_tokens)
            (merged_N,) = engine.losses([NoAdapter()], rows, range(len(rows)))
    except UserError as error:
        say(f"not measured: {error}")
        return None
    counts_N = rows.counts()
    base, adapter, merged = (loss_value(sums_N, counts_N) for sums_N in (base_N, adapter_N, merged_N))
    return MergeLosses(base, adapter, merged, difference(merged_N, adapter_N, counts_N), len(rows))
