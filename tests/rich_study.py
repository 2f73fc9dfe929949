"""A study written by hand in which there is something to say on every topic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hand_made import HandMade

COSTS = {
    "lora": SimpleNamespace(
        setting="lora-002",
        trainable=4_884_480,
        adapter_bytes=19_600_000,
        peak_bytes=1_500_000_000,
        tokens_per_second=410.0,
        row_tokens=1024,
        data_tokens=1,
    ),
    "prompt_tuning": SimpleNamespace(
        setting="prompt_tuning-001",
        trainable=4_608,
        adapter_bytes=18_900,
        peak_bytes=None,
        tokens_per_second=380.0,
        row_tokens=1024,
        data_tokens=1,
    ),
}
"""What was measured at the end of the study; nothing of prefix tuning."""


def rich(folder: Path) -> HandMade:
    """Returns a finished study of three methods with failures of every kind, finals, a ranking and changes."""
    study = HandMade(
        folder,
        {
            "lora": {"rank": [8, 16], "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
            "prefix_tuning": {"learning_rate": [1e-3, 1e-2, 1e-1], "init": ["text", "zero"]},
            "prompt_tuning": {"learning_rate": {"low": 1e-3, "high": 1.0, "log": True}, "tokens": 8},
        },
        finals={"best": 1, "seeds": 2},
    )
    rng = np.random.default_rng(0)
    for number in range(34):
        rate = float(10 ** rng.uniform(-4, -2))
        gain = 0.8 - 0.4 * abs(np.log10(rate / 1e-3)) + 0.02 * rng.standard_normal()
        study.trial("lora", rate, gain, noise=0.05, rank=(8, 16)[number % 2])
    study.trial("lora", 9e-3, None, rank=8)
    study.trial("lora", 5e-4, 0.1, status="pruned", reason="at step 11 worse", rank=16)
    for rate, init, gain in ((1e-3, "text", -0.2), (1e-2, "text", 0.3), (1e-1, "zero", 0.5), (1e-2, "zero", 0.0)):
        study.trial("prefix_tuning", rate, gain, init=init)
    study.trial("prefix_tuning", 1e-1, None, status="failed", reason="does not fit", init="text")
    study.trial("prompt_tuning", 0.5, 0.45, noise=0.3)
    study.trial("prompt_tuning", 0.9, 0.50, noise=0.3)
    study.events.append(
        {"event": "recommended", "method": "lora", "values": {"rank": 8, "learning_rate": 1e-3}, "rates": [5e-4, 2e-3]}
        | {"within": 0.012}
    )
    study.events.append(
        {"event": "widened", "method": "prompt_tuning", "dimension": "learning_rate", "note": "widened to 3"}
        | {"bounds": [1e-3, 3.0], "fresh": [1.0, 3.0]}
    )
    best = int(study.numbers("lora")[0])
    study.chosen(lora=[best], prefix_tuning=[2], prompt_tuning=[1])
    finals = study.finals("lora", best, [0.8, 0.82]) + study.finals("prefix_tuning", 2, [0.5, 0.52])
    finals += study.finals("prompt_tuning", 1, [0.5, 0.51])
    study.concluded("lora", best)
    study.opened(**{name: 0.8 if name.startswith("lora") else 0.5 for name in finals})
    return study
