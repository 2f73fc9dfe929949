"""The parts that all trials of a run share: base, tokens, held-out parts, the base's own losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from peft_study.config import DataConfig, ModelConfig, TrainingConfig
from peft_study.data.chat import ChatEncoder, behind_bos
from peft_study.data.conversation import Example
from peft_study.data.dataset import Rows
from peft_study.data.split import Split, check_files, make_split
from peft_study.doctor.observations import DataCounts, Observations
from peft_study.doctor.rule import examine
from peft_study.engine.engine import Engine
from peft_study.engine.heldout import BaseLosses
from peft_study.engine.memory import Room
from peft_study.engine.processes import ALONE, ProcessGroup
from peft_study.errors import ConfigError, ModelError, OutputError, TemplateError
from peft_study.methods.base import Material, Size
from peft_study.methods.reference import NoAdapter
from peft_study.model.in_memory import ModelInMemory, borrow
from peft_study.model.load import Base, load_base, load_tokenizer, resolve_model
from peft_study.model.precision import choose
from peft_study.seeds import key
from peft_study.statistics import Losses
from peft_study.storage.cache_dir import cache_root, numbers_digest
from peft_study.storage.run_dir import RunFolder

_MATERIAL_ROWS = 2000


class Say(Protocol):
    """Shows the user a line, or work that takes time.

    ``say(line)`` shows a line that stays; one that begins with ``WARNING:`` also where the user asked for quiet.
    ``say(line, share)`` says that `share` (0..1) of the work in `line` is done: 0 at its beginning, or for as long as
    nobody knows; 1 at its end.
    """

    def __call__(self, line: str, share: float | None = None, /) -> None:
        """Shows it."""


def unheard(_line: str, _share: float | None = None, /) -> None:
    """Is a `Say` that shows nothing."""


@contextmanager
def timed(say: Say, line: str) -> Iterator[None]:
    """Shows the block as work that takes time."""
    say(line, 0.0)
    try:
        yield
    finally:
        say(line, 1.0)


@dataclass(frozen=True, slots=True)
class Session:
    """The shared parts of a run.

    Attributes:
        base: the frozen model.
        engine: it runs on.
        room: memory for trials.
        longest: tokens of the longest example of all parts.
        encoder: how conversations become tokens, and
        add_bos: whether it puts BOS first.
        train, held_out, test: the rows; only a study has test rows.
        available: training rows there would be without ``data.limit``.
        material: tokens for initialisations.
        base_train, base_held_out, base_test: the untouched base's losses.
        notes: lines the user should see once.
        processes: that run the same trials, this one among them.
    """

    base: Base
    engine: Engine
    room: Room
    longest: int
    encoder: ChatEncoder
    add_bos: bool
    train: Rows
    held_out: Rows
    test: Rows | None
    available: int
    material: Material
    base_train: BaseLosses
    base_held_out: BaseLosses
    base_test: BaseLosses | None
    notes: tuple[str, ...]
    processes: ProcessGroup = ALONE


def open_session(
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    say: Say,
    *,
    test: bool = False,
    processes: ProcessGroup = ALONE,
    in_memory: ModelInMemory | None = None,
) -> Session:
    """Loads the base, tokenises the data (or finds it in the cache) and splits off the held-out ones.

    Args:
        model, data: as configured.
        training: gives seeds, row size and gradient checkpointing.
        say: receives each step that takes time.
        test: whether rows are put aside for the final test.
        processes: that run the same trials; the one that writes comes first and fills the caches for the others.
        in_memory: the base and its tokenizer, where nothing is loaded.

    Raises:
        UserError: of many kinds, each one line.
    """
    if not processes.writes:
        processes.wait()
    notes: list[str] = []
    tokenizer, encoder = _check(model, data, in_memory, test=test)
    base = _load(model, tokenizer, say, notes) if in_memory is None else borrow(in_memory)
    notes += _about_packing(base)
    rows = _read(data, encoder, training.data_seed, say, test=test)
    notes += rows.notes
    if processes.writes:
        processes.wait()
    recompute = training.gradient_checkpointing
    engine = Engine(base, row_tokens=training.row_tokens, gradient_checkpointing=recompute is True, processes=processes)
    parts = [part for part in (rows.train, rows.held_out, rows.test) if part is not None]
    return Session(
        base,
        engine,
        _room(engine, processes, recomputes=recompute == "auto"),
        _longest(base, parts),
        encoder,
        data.add_bos,
        rows.train,
        rows.held_out,
        rows.test,
        rows.available,
        _material(base, rows.train, training.data_seed),
        _base_losses(engine, rows.train),
        _base_losses(engine, rows.held_out),
        None if rows.test is None else _base_losses(engine, rows.test),
        tuple(notes),
        processes,
    )


def _check(
    model: ModelConfig, data: DataConfig, in_memory: ModelInMemory | None, *, test: bool
) -> tuple[Any, ChatEncoder]:
    """Returns tokenizer and encoder; refuses bad templates, files and paths before the model is loaded."""
    if in_memory is not None:
        tokenizer = in_memory.tokenizer
    else:
        choose(model.device, model.dtype)
        resolve_model(model.name)
        tokenizer = load_tokenizer(
            model.tokenizer or model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    try:
        encoder = ChatEncoder(tokenizer, template=data.chat_template, max_length=data.max_length, add_bos=data.add_bos)
    except TemplateError as error:
        raise error.within("data.chat_template") from error
    check_files(data, encoder, test=test)
    return tokenizer, encoder


def _load(model: ModelConfig, tokenizer: Any, say: Say, notes: list[str]) -> Base:
    """Loads the base; adds a note where its precision may surprise."""
    placement = choose(model.device, model.dtype)
    notes += [placement.note] if placement.note else []
    precision = f"{model.quantization}, computing in " if model.quantization else ""
    with timed(say, f"loading {model.name} on {placement.device} in {precision}{placement.dtype_name}"):
        base = load_base(
            model.name,
            tokenizer=tokenizer,
            revision=model.revision,
            placement=placement,
            quantization=model.quantization,
            trust_remote_code=model.trust_remote_code,
        )
    base.tokenizer_name = model.tokenizer
    return base


def _about_packing(base: Base) -> list[str]:
    """Returns a note where the base runs one example a row."""
    if not base.proof.segmented:
        return [f"{base.name}: its attention is not known here; it is run as it is, one example a row"]
    if not base.proof.packs:
        return [f"{base.name}: positions of a row meet outside attention; it is run one example a row"]
    return []


def _read(data: DataConfig, encoder: ChatEncoder, seed: int, say: Say, *, test: bool) -> Split:
    """Tokenises the data, or finds it in the cache, and divides it."""
    reading = "reading and tokenising the data"

    def on_progress(_rows: int, share: float) -> None:
        say(reading, min(share, 0.99))  # dividing the rows is still to come

    with timed(say, reading):
        return make_split(data, encoder, seed, test=test, on_progress=on_progress)


def _room(engine: Engine, processes: ProcessGroup, *, recomputes: bool) -> Room:
    """Returns the memory for trials; processes that train together have equal shares, and all use the same figure."""
    room = Room(engine, sharing=processes.count, recomputes=recomputes)
    (free,) = processes.of_first([-1.0 if room.free is None else float(room.free)])
    room.free = None if free < 0 else int(free)
    return room


def _longest(base: Base, parts: Sequence[Rows]) -> int:
    longest = int(max(part.lengths().max(initial=0) for part in parts))
    refuse_past_positions(base, longest)
    return longest


def refuse_past_positions(base: Base, longest: int, method: Size | None = None) -> None:
    """Refuses examples that the model has no positions for.

    Args:
        base: the model.
        longest: tokens of the longest example.
        method: of which virtual tokens stand before it.

    Raises:
        ConfigError: the examples themselves are too long.
        ModelError: they are with the method's tokens.
    """
    virtual = 0 if method is None else method.row_tokens + method.prefix_tokens
    data = DataCounts(longest=longest, virtual_tokens=virtual, positions=base.positions)
    found = examine(Observations(data=data), checks=("past_positions",))
    found.refuse(ConfigError if method is None else ModelError, where="max_length" if method is None else None)


def refuse_other_inputs(now: dict[str, dict[str, object]], folder: RunFolder) -> None:
    """Refuses to resume a run whose data or base changed under the same names since it began.

    Raises:
        OutputError: naming what changed.
    """
    before = folder.record()
    if before is None:
        return
    changed = [
        what
        for what, part, name in (
            ("the base model's weights", "base", "digest"),
            ("the chat template or tokenizer", "data", "encoder"),
            ("the training rows", "data", "train_digest"),
            ("the held-out rows", "data", "held_out_digest"),
            ("the test rows", "data", "test_digest"),
        )
        if before[part][name] != now[part][name]
    ]
    if changed:
        raise OutputError(
            f"since this run began, {' and '.join(changed)} changed",
            where=str(folder.path),
            remedy="put them back to resume, or start a new run in another folder",
        )


def _base_losses(engine: Engine, rows: Rows) -> BaseLosses:
    base = engine.base
    precision = "-".join(filter(None, (base.quantization, base.placement.dtype_name)))
    # devices round differently: a trial is compared with losses of its own device
    name = f"{rows.fingerprint()[:24]}-{base.digest[:16]}-{numbers_digest()[:16]}-{base.device.type}-{precision}.npy"
    path = None if base.digest == "unknown" else cache_root() / "base-losses" / name

    def measure(indices: Sequence[int]) -> Losses:
        return engine.losses([NoAdapter()], rows, indices)[0]

    return BaseLosses(measure, len(rows), path, processes=engine.processes)


def measure_base(session: Session, say: Say) -> None:
    """Measures the untouched base on the held-out rows where that was not done yet."""
    losses = session.base_held_out
    if losses.missing:
        with timed(say, f"measuring the untouched base on {losses.missing} held-out rows"):
            losses.of(range(len(session.held_out)))


def bos_losses(session: Session) -> str:
    """Returns a line with the untouched base's held-out loss as the data is, and with BOS before every example."""
    bos, rows = session.base.tokenizer.bos_token_id, session.held_out
    as_they_are = session.base_held_out.of(range(len(rows))).sum() / rows.counts().sum()
    behind, most = [behind_bos(rows[i], bos) for i in range(len(rows))], session.encoder.max_length
    cut = [Example(example.tokens_L[:most], example.supervised_L[:most]) for example in behind]
    examples = [example for example in cut if example.supervised_L.any()]
    sums_N = session.engine.losses([NoAdapter()], examples, range(len(examples)))[0]
    with_bos = sums_N.sum() / sum(int(example.supervised_L.sum()) for example in examples)
    return f"the untouched base's held-out loss is {as_they_are:.3f} so, and {with_bos:.3f} with BOS"


def _material(base: Base, train: Rows, seed: int) -> Material:
    """Gathers the tokens for initialisations from up to 2,000 training rows, drawn at random.

    A mixture is often ordered by source, so the first rows would be of one source.
    """
    tokenizer = base.tokenizer
    size = base.model.config.get_text_config().vocab_size
    counts_V, opening = np.zeros(size, dtype=np.int64), list[int]()
    for row in np.random.default_rng(key(seed, "material")).permutation(len(train))[:_MATERIAL_ROWS].tolist():
        example = train[row]
        counts_V += np.bincount(example.tokens_L, minlength=size)[:size]
        if len(opening) < 4096:
            opening += [int(t) for t in example.tokens_L]
    bos = tokenizer.bos_token_id
    return Material(
        encode=lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        opening=opening,
        counts_V=counts_V,
        bos=bos if bos is not None and opening[:1] == [bos] else None,
        special=frozenset(i for i in tokenizer.all_special_ids if i < size),
    )


def describe(session: Session) -> dict[str, dict[str, object]]:
    """Returns the record of data and base that the numbers are computed from."""
    base = session.base
    test = session.test
    parts = [session.train, session.held_out, *([] if test is None else [test])]
    tokens = {data.key for part in parts for data, _ in part.places}
    return {
        "base": {
            "path": base.path,
            "digest": base.digest,
            "origin": base.origin,
            "quantization": base.quantization,
            "dtype": base.placement.dtype_name,
            "device": str(base.device),
            "proof": dataclasses.asdict(base.proof),
        },
        "data": {
            "tokens": sorted(tokens),
            "template": session.encoder.template_name,
            "clock": session.encoder.clock.isoformat(),
            "encoder": session.encoder.fingerprint,
            "train_rows": len(session.train),
            "available_rows": session.available,
            "train_digest": session.train.digest(),
            "held_out_rows": len(session.held_out),
            "held_out_digest": session.held_out.digest(),
            "held_out_supervised_tokens": int(session.held_out.counts().sum()),
            "test_rows": None if test is None else len(test),
            "test_digest": None if test is None else test.digest(),
            "test_supervised_tokens": None if test is None else int(test.counts().sum()),
        },
        "engine": {"row_tokens": session.engine.row_tokens},
    }
