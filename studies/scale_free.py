"""Virtual tokens in units of the model: does one rate then serve models whose numbers are of other sizes?

    python studies/scale_free.py exact      # the same function in other units, tiny model: seconds
    python studies/scale_free.py smollm2    # prefix tuning on `words`, in both units; studies/scale_free.parquet

A prompt is trained as multiples of the embedding table's root mean square; a prefix, layer by layer, as multiples of
that of the base's own keys and of its own values. Exact test: embedding, o_proj and down_proj times c, k_proj times c
with q_proj by 1/c, v_proj times c with o_proj by 1/c once more, and RMSNorm's epsilon times c squared. That is the same
function of the same tokens, and for powers of two it has the same bits.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pandas as pd
import torch
from experiment import HELD_OUT, HERE, MODEL, RUNS, SETS, prepare
from torch import Tensor

import peft_study
from peft_study.config import DataConfig, ModelConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig, validate
from peft_study.engine.trial import Trial
from peft_study.methods.prefix_tuning import PrefixAdapter, text_table
from peft_study.methods.prompt_tuning import PromptAdapter, table_rms
from peft_study.model.load import Base, wrap
from peft_study.model.precision import Placement
from peft_study.training.session import open_session

SCALES = 1 / 8, 1 / 2, 1.0, 2.0, 8.0
STEPS = 20
RATES = 0.003, 0.01, 0.03, 0.1, 0.3
"""Tried on SmolLM2, in either unit."""


class ScaledPrompt(PromptAdapter):
    """A prompt in units of the embedding table.

    Args:
        plain: the same, as it is.
        unit: root mean square of the table.
    """

    def __init__(self, plain: PromptAdapter, unit: float) -> None:
        super().__init__(plain.config, plain.embeddings() / unit)
        self._unit = unit

    def embeddings(self) -> Tensor:
        """Returns the (P, E) vectors, float32."""
        return self._embeddings * self._unit


class ScaledPrefix(PrefixAdapter):
    """A prefix in units of each layer's keys and values.

    Args:
        plain: the same, as it is.
        base: of both.
        units_W: root mean squares, W numbers as a row of the table.
    """

    def __init__(self, plain: PrefixAdapter, base: Base, units_W: Tensor) -> None:
        super().__init__(plain.config, base, plain.table().detach() / units_W, seed=0)
        self._units_W = units_W.to(base.device)

    def table(self) -> Tensor:
        """Returns the (P, layers * 2 * G * D) keys and values that the model sees, float32."""
        return self._table * self._units_W


def units(base: Base, ids: list[int]) -> Tensor:
    """Returns the root mean square of the base's keys and values in each layer, W numbers as a row of a table."""
    table = text_table(base, ids).view(len(ids), base.layers, 2, -1)
    rms = table.pow(2).mean(dim=(0, 3), keepdim=True).sqrt()
    return rms.expand(1, -1, -1, table.shape[-1]).reshape(-1)


def losses(base: Base, adapter: Any, rate: float, examples: Any) -> list[float]:
    """Returns the loss of every step of a short training."""
    training = TrainingConfig(steps=STEPS, batch_size=4, learning_rate=rate, schedule="constant", warmup_ratio=0.0)
    engine = peft_study.Engine(base)
    trial = Trial("run", adapter, training, examples)
    engine.admit(trial)
    found: list[float] = []
    while not trial.finished:
        found += [event.report.loss for event in engine.step() if event.report is not None]
    engine.evict(trial)
    return found


def exact() -> None:
    """Prints how far the curves of scaled models are from the unscaled one's, in either unit."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny_world

    examples = tiny_world.examples([12, 9, 15, 11, 8, 14, 10, 13])
    material = tiny_world.material()
    curves: dict[tuple[str, str], list[list[float]]] = {}
    for scale in SCALES:
        base = wrap(scaled(tiny_world, scale), None, Placement(torch.device("cpu"), torch.float32), path="tiny")
        ids = list(material.opening[:32])
        for init in ("text", "random"):
            prompt = PromptAdapter.create(PromptTuningConfig(tokens=4, init=init), base, material, 0)
            prefix = PrefixAdapter.create(PrefixTuningConfig(tokens=4), base, material, 0)
            adapters = {
                ("prompt", "as it is"): (prompt, 0.3),
                ("prompt", "in units"): (ScaledPrompt(prompt, table_rms(base)), 0.3),
                ("prefix", "as it is"): (prefix, 0.1),
                ("prefix", "in units"): (ScaledPrefix(prefix, base, units(base, ids)), 0.1),
            }
            for (method, unit), (adapter, rate) in adapters.items():
                if method == "prompt" or init == "text":
                    name = f"{method} from {init}"
                    curves.setdefault((name, unit), []).append(losses(base, adapter, rate, examples))
    middle = SCALES.index(1.0)
    for (name, unit), each in curves.items():
        apart = max(abs(a - b) for curve in each for a, b in zip(curve, each[middle], strict=True))
        fall = each[middle][0] - each[middle][-1]
        print(f"{name:20} {unit:9} falls by {fall:.3f}; scaled models differ by up to {apart:.6f}")


def scaled(tiny_world: Any, scale: float) -> Any:
    """Returns the tiny Llama with an untied head, in other units."""
    config = tiny_world.config("llama")
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = tiny_world.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
        model.model.embed_tokens.weight.mul_(scale)
        model.model.norm.variance_epsilon *= scale**2
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(scale)
            layer.self_attn.q_proj.weight.div_(scale)
            layer.self_attn.v_proj.weight.mul_(scale)
            # times c for the residual stream, by 1/c for the values
            layer.mlp.down_proj.weight.mul_(scale)
            layer.input_layernorm.variance_epsilon *= scale**2
            layer.post_attention_layernorm.variance_epsilon *= scale**2
    return model.eval()


def smollm2() -> None:
    """Trains the same prefix at each rate in either unit, all side by side, and writes a row a trial."""
    prepare("words")
    data = {"train": str(RUNS / "words.jsonl"), "held_out": HELD_OUT, "max_length": SETS["words"].most}
    training = TrainingConfig(steps=66, batch_size=4)
    session = open_session(ModelConfig(name=MODEL), validate(DataConfig, data, where="data"), training, print)
    base, some = session.base, range(len(session.held_out))
    plain = PrefixAdapter.create(PrefixTuningConfig(tokens=20), base, session.material, 0)
    units_W = units(base, session.material.text_tokens(None, 64))
    trials = {}
    for unit in ("as it is", "in units"):
        for rate in RATES:
            made = PrefixAdapter(plain.config, base, plain.table().detach().clone(), 0)
            adapter = made if unit == "as it is" else ScaledPrefix(made, base, units_W)
            settings = training.model_copy(update={"learning_rate": rate})
            trials[unit, rate] = Trial(f"{unit} {rate}", adapter, settings, session.train)
    engine = session.engine
    engine.slots = len(trials)
    for trial in trials.values():
        engine.admit(trial)
    while any(not trial.finished for trial in engine.trials):
        for event in engine.step():
            if event.trial in engine.trials and (event.trial.finished or event.report is None):
                engine.evict(event.trial)
    tokens = session.held_out.counts().tokens_N.sum()
    before = float(session.base_held_out.of(some).sum() / tokens)
    rows = []
    for (unit, rate), trial in trials.items():
        loss = float(engine.losses([trial.adapter], session.held_out, some)[0].sum() / tokens)
        rows.append({"unit": unit, "learning_rate": rate, "dev": loss, "dev_minus_base": loss - before})
        print(f"{unit:9} {rate:<6g} {loss:.4f} ({loss - before:+.4f})", flush=True)
    frame = pd.DataFrame(rows)
    frame["least_unit"], frame["largest_unit"] = float(units_W.min()), float(units_W.max())
    frame.to_parquet(HERE / "scale_free.parquet", index=False)


def main() -> None:
    """Does what the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("exact", "smollm2"))
    (exact if parser.parse_args().do == "exact" else smollm2)()


if __name__ == "__main__":
    main()
