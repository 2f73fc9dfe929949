"""The search for TRL's best settings: the same examples, every candidate in turn, the fastest that computes the same.

    python benchmarks/trl_best.py --methods lora                              # all candidates
    python benchmarks/trl_best.py --methods lora --candidates b1 b4 packed    # some

Packed and padding-free batches are wrong with soft prompts: the virtual tokens stand before a row, not before each of
its examples, and the loss is another one (tests/benchmarks).

What wins is written by hand into trl_peer.py. Rows go to results/trl_best.jsonl.
"""

from __future__ import annotations

import gc
from typing import Any

from common import Rows, arguments
from one_trial import make_peers, measure, same_work
from peers import Peer
from trl_peer import LEAN, TrlPeer
from worlds import METHODS, MODELS, adapter_of, open_world

_GROUPED: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}


def _batch(size: int, whole: int = 8, **more: Any) -> dict[str, Any]:
    """Returns settings of optimizer batches of `whole` examples in parts of `size`."""
    parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, whole // size)}
    return {**LEAN, **parts, **more}


CANDIDATES: dict[str, dict[str, Any]] = {
    "b1": _batch(1),
    "b2": _batch(2, **_GROUPED),
    "b4": _batch(4, **_GROUPED),
    "b8": _batch(8, **_GROUPED),
    "b16": _batch(16, **_GROUPED),
    "b32": _batch(32, **_GROUPED),
    "b8 random order": _batch(8),
    "b1 no autocast": _batch(1, bf16=False),
    "b4 no autocast": _batch(4, bf16=False, **_GROUPED),
    "b8 no autocast": _batch(8, bf16=False, **_GROUPED),
    "b1 eager": _batch(1, attention="eager"),
    "b2 eager": _batch(2, attention="eager", **_GROUPED),
    "b2 no autocast eager": _batch(2, bf16=False, attention="eager", **_GROUPED),
    "b1 no autocast eager": _batch(1, bf16=False, attention="eager"),
    "b4 no autocast eager": _batch(4, bf16=False, attention="eager", **_GROUPED),
    "packed": _batch(1, 1, packing=True),
    "packed no autocast": _batch(1, 1, packing=True, bf16=False),
    "packed 8 rows": _batch(8, packing=True),
    "padding-free b4": _batch(4, padding_free=True, max_length=None),
    "padding-free b4 no autocast": _batch(4, padding_free=True, max_length=None, bf16=False),
    "b1 no autocast compiled": _batch(1, bf16=False, torch_compile=True),
    # of CUDA
    "packed flash": _batch(8, packing=True, attention="flash_attention_2"),
    "packed flash liger": _batch(8, packing=True, attention="flash_attention_2", use_liger_kernel=True),
    "b8 liger": _batch(8, use_liger_kernel=True, **_GROUPED),
}


def main(words: list[str] | None = None) -> None:
    """Measures the candidates and writes a row each."""
    parser = arguments(__doc__, "trl_best")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--pool", type=int, default=32, help="examples of a pass")
    parser.add_argument("--rounds", type=int, default=2, help="counted passes of each candidate")
    parser.set_defaults(peers=["ours"], batch_size=8, loop_batch_size=None, row_tokens=None)
    options = parser.parse_args(words)
    world = open_world(options.model, options.device)
    examples, source = world.examples(options.pool)
    for method in options.methods:
        config = METHODS[method]
        rows = Rows(options, model=options.model, method=method, data=source, pool=options.pool)
        (ours,) = make_peers(world, method, examples, options)
        reference = ours.run()
        adapter = adapter_of(config, world.base())
        for name in options.candidates:
            try:
                peer: Peer = TrlPeer(name, world, config, adapter, examples, CANDIDATES[name])
            except (ImportError, ValueError, RuntimeError) as error:
                rows.add(row="failed", peer=name, settings=CANDIDATES[name], error=f"{type(error).__name__}: {error}")
                continue
            passes = measure([peer], options.rounds, rows).get(name)
            if passes:
                best = max(passes[1:], key=lambda p: p.tokens / p.seconds)
                padding = round(1 - passes[0].tokens / passes[0].positions, 3)
                same = same_work(passes[0], reference)
                rows.add(
                    row="best",
                    peer=name,
                    settings=peer.settings,
                    tokens_per_second=round(best.tokens / best.seconds, 1),
                    # says more than the clock where others use the machine (with OMP_NUM_THREADS=1: threads spin)
                    tokens_per_cpu_second=round(max(p.tokens / p.cpu_seconds for p in passes[1:]), 1),
                    loss=round(passes[0].loss, 5),
                    our_loss=round(reference.loss, 5),
                    padding=padding,
                    **same,
                )
            del peer
            gc.collect()


if __name__ == "__main__":
    main()
