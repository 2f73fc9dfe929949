"""One trial: this project against peft with a plain loop and TRL's SFTTrainer, on the same real examples.

    python benchmarks/one_trial.py                                      # the embedded model on this machine
    python benchmarks/one_trial.py --methods lora --rounds 1 --pool 16  # a quick look
    python benchmarks/one_trial.py --model llama-1b --batch-size 40 --row-tokens 8192 --methods lora

Every round lets each peer go once over the same pool of examples, one peer after the other; the first round warms up
and is not counted. Tokens a second are data tokens: padding and virtual tokens do not count. All peers start from the
same adapter and keep it (how: peers.py), so their losses must agree; the row of one that does not is marked.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from common import Rows, arguments, ceiling, median
from peers import Ours, Pass, Peer, PeftLoop
from trl_peer import DEFAULT, TrlPeer, best
from worlds import METHODS, MODELS, World, adapter_of, open_world

from peft_study.data.conversation import Example

PEERS = ("ours", "peft_loop", "peft_loop_grouped", "trl_default", "trl_best")
TOLERANCE = 0.005
"""Largest relative difference of two losses of the same tokens in bfloat16 that is taken for rounding."""


def make_peers(world: World, method: str, examples: list[Example], options: argparse.Namespace) -> list[Peer]:
    """Returns the peers asked for; one that cannot be made is named and left out."""
    config, base = METHODS[method], world.base()
    adapter, batch = adapter_of(config, base), options.batch_size
    loop_batch = options.loop_batch_size or batch
    device = world.placement.device.type
    makers: dict[str, Callable[[], Peer]] = {
        "ours": lambda: Ours(base, adapter, examples, batch, options.row_tokens),
        "peft_loop": lambda: PeftLoop(world.model(), config, adapter, examples, loop_batch),
        "peft_loop_grouped": lambda: PeftLoop(world.model(), config, adapter, examples, loop_batch, grouped=True),
        "trl_default": lambda: TrlPeer("trl_default", world, config, adapter, examples, DEFAULT[method]),
        "trl_best": lambda: TrlPeer("trl_best", world, config, adapter, examples, best(device, method)),
    }
    return [peer for name in options.peers if (peer := _made(name, makers[name])) is not None]


def _made(name: str, make: Callable[[], Peer]) -> Peer | None:
    try:
        return make()
    except (ImportError, ValueError, RuntimeError, torch.OutOfMemoryError) as error:
        print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
        return None


def measure(peers: list[Peer], rounds: int, rows: Rows) -> dict[str, list[Pass]]:
    """Runs the peers in turn, the round to warm up first, and writes a row a pass; a peer that fails drops out.

    Returns:
        The passes of each peer that got through.
    """
    passes: dict[str, list[Pass]] = {peer.name: [] for peer in peers}
    for number in range(rounds + 1):
        for peer in [peer for peer in peers if peer.name in passes]:
            try:
                found = peer.run()
            except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
                rows.add(row="failed", peer=peer.name, settings=peer.settings, error=f"{type(error).__name__}: {error}")
                del passes[peer.name]
                continue
            passes[peer.name].append(found)
            rows.add(
                row="round" if number else "warm-up",
                peer=peer.name,
                settings=peer.settings,
                round=number,
                tokens_per_second=round(found.tokens / found.seconds, 1),
                seconds=round(found.seconds, 3),
                cpu_seconds=round(found.cpu_seconds, 3),
                step_seconds=[round(s, 3) for s in found.steps],
            )
    return passes


def same_work(found: Pass, expected: Pass) -> dict[str, Any]:
    """Returns whether a peer saw the same tokens, the same labels and nearly the same loss."""
    return {
        "same_tokens": (found.tokens, found.supervised) == (expected.tokens, expected.supervised),
        "same_loss": abs(found.loss - expected.loss) <= TOLERANCE * abs(expected.loss),
    }


def flops(base: Any, examples: list[Example]) -> tuple[float, float]:
    """Returns FLOP of a pass, 4 a parameter and token plus attention; and with the head on supervised tokens only.

    Attention: a causal segment of L tokens has L*L/2 pairs; each costs 4*D FLOP a head forward, twice that backward.
    """
    tokens, supervised = (sum(x) for x in zip(*((len(e), int(e.supervised_L.sum())) for e in examples), strict=True))
    attention = sum(6 * len(e) ** 2 * base.heads * base.head_dim * base.layers for e in examples)
    head = base.head.weight.numel()
    embedding = 0 if base.head.weight is base.model.get_input_embeddings().weight else head
    body = base.parameter_count() - head - embedding
    return 4 * base.parameter_count() * tokens + attention, 4 * (body * tokens + head * supervised) + attention


def main(words: list[str] | None = None) -> None:
    """Measures the methods and writes a row a peer and round, and one with the medians of each peer."""
    parser = arguments(__doc__, "one_trial")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--pool", type=int, default=32, help="examples of a pass")
    parser.add_argument("--rounds", type=int, default=5, help="counted passes of each peer")
    parser.add_argument("--batch-size", type=int, default=8, help="examples an optimizer step")
    parser.add_argument("--loop-batch-size", type=int, help="of the plain loop, where memory wants a smaller one")
    parser.add_argument("--row-tokens", type=int, help="ours: tokens a row; the engine's default where not given")
    options = parser.parse_args(words)
    world = open_world(options.model, options.device)
    examples, source = world.examples(options.pool)
    device, dtype = world.placement.device, world.placement.dtype
    for method in options.methods:
        peers = make_peers(world, method, examples, options)
        rows = Rows(
            options,
            model=options.model,
            method=method,
            device=device.type,
            dtype=world.placement.dtype_name,
            data=source,
            pool=options.pool,
        )
        passes = measure(peers, options.rounds, rows)
        peak = ceiling(device, dtype)
        work = flops(world.base(), examples)
        reference = passes.get("ours") or next(iter(passes.values()))
        for peer in peers:
            if peer.name in passes:
                summarise(rows, peer, passes[peer.name], reference[0], work, peak)
        del peers
        gc.collect()


def summarise(
    rows: Rows, peer: Peer, passes: list[Pass], expected: Pass, work: tuple[float, float], peak: float
) -> None:
    """Writes the row with the medians of one peer."""
    counted = passes[1:]
    speed = median([p.tokens / p.seconds for p in counted])
    rows.add(
        row="median",
        peer=peer.name,
        settings=peer.settings,
        rounds=len(counted),
        tokens_per_second=speed,
        tokens=expected.tokens,
        supervised=passes[0].supervised,
        loss=round(passes[0].loss, 5),
        **same_work(passes[0], expected),
        padding=round(1 - passes[0].tokens / passes[0].positions, 3),
        share_of_ceiling=round(work[0] / expected.tokens * speed / peak, 3),
        share_head_on_supervised=round(work[1] / expected.tokens * speed / peak, 3),
        ceiling_tflops=round(peak / 1e12, 3),
    )


if __name__ == "__main__":
    main()
