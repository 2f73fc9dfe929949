"""What every trial of a run shares: the base, the tokens, the held-out part, the base's own losses."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from peft_study.config import DataConfig, MethodConfig, ModelConfig, Source, TrainingConfig
from peft_study.data import skills
from peft_study.data.cache import TokenizedData, tokenize
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Example
from peft_study.engine.engine import Engine
from peft_study.engine.heldout import BaseLosses, Losses
from peft_study.engine.processes import ALONE, Processes
from peft_study.errors import ConfigError, OutputError
from peft_study.methods.base import Material
from peft_study.methods.dropout import key
from peft_study.methods.reference import NoAdapter
from peft_study.methods.registry import create
from peft_study.model.load import Base, load_base
from peft_study.model.precision import choose
from peft_study.places import cache_root
from peft_study.study.store import RunFolder

HELD_OUT_ROWS = 64
"""Held-out rows where nothing is said; at most a tenth of the data."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rows:
    """Chosen rows of several tokenised sources, as one sequence of examples."""

    places: tuple[tuple[TokenizedData, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        data, row = self.places[index]
        return data[row]

    def counts(self) -> npt.NDArray[np.int64]:
        """Returns the supervised tokens of each row."""
        return np.array([int(data.supervised_N[row]) for data, row in self.places], dtype=np.int64)

    def fingerprint(self) -> str:
        """Returns a digest of which rows these are."""
        digest = hashlib.sha256()
        for data, row in self.places:
            digest.update(f"{data.key}:{row}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Session:
    """The shared parts of a run.

    Attributes:
        base: the frozen model.
        engine: it runs on.
        encoder: how conversations become tokens, and
        add_bos: whether it puts BOS first.
        train, held_out: the rows.
        material: what initialisations draw on.
        base_train, base_held_out: the untouched base's losses.
        notes: lines the user should see once.
        processes: that run the same trials, this one among them.
    """

    base: Base
    engine: Engine
    encoder: ChatEncoder
    add_bos: bool
    train: Rows
    held_out: Rows
    material: Material
    base_train: BaseLosses
    base_held_out: BaseLosses
    notes: tuple[str, ...]
    processes: Processes = ALONE


def open_session(
    model: ModelConfig, data: DataConfig, training: TrainingConfig, say: Say, *, processes: Processes = ALONE
) -> Session:
    """Loads the base, tokenises the data (or finds it in the cache) and splits off the held-out rows.

    Args:
        model, data: as configured.
        training: gives seeds, row size and gradient checkpointing.
        say: receives a line before each step that takes time.
        processes: that run the same trials; the one that writes comes first and fills the caches for the others.

    Raises:
        UserError: of many kinds, each one line.
    """
    if not processes.writes:
        processes.wait()
    placement = choose(model.device, model.dtype)
    notes = [placement.note] if placement.note else []
    say(f"loading {model.name} on {placement.device} in {placement.dtype_name}")
    base = load_base(
        model.name,
        tokenizer=model.tokenizer,
        revision=model.revision,
        placement=placement,
        quantization=model.quantization,
        trust_remote_code=model.trust_remote_code,
    )
    if not base.proof.segmented:
        notes.append(f"{model.name}: its attention is not one known here; it is run as it is, one example a row")
    elif not base.proof.packs:
        notes.append(f"{model.name}: positions of a row meet outside attention; it is run one example a row")
    encoder = ChatEncoder(base.tokenizer, template=data.chat_template, max_length=data.max_length, add_bos=data.add_bos)
    say("reading and tokenising the data")
    train, held_out, lines = _split(data, encoder, training.data_seed)
    notes += lines
    if processes.writes:
        processes.wait()
    engine = Engine(
        base,
        row_tokens=training.row_tokens,
        gradient_checkpointing=training.gradient_checkpointing,
        processes=processes,
    )
    return Session(
        base,
        engine,
        encoder,
        data.add_bos,
        train,
        held_out,
        _material(base, train),
        _base_losses(engine, train),
        _base_losses(engine, held_out),
        tuple(notes),
        processes,
    )


def check_methods(session: Session, methods: Iterable[MethodConfig], seed: int) -> None:
    """Makes each method's adapter once, so that what does not fit this base or data is said before anything is written.

    Raises:
        ModelError: when a method does not fit the model.
        ConfigError: when the data is too small for its initialisation.
    """
    for method in methods:
        if method.method != "full":  # which fits every model, and would copy all of it
            create(method, session.base, session.material, seed)


def refuse_other_inputs(session: Session, folder: RunFolder) -> None:
    """Refuses to go on with a run whose data or base changed under the same names since it began.

    Raises:
        OutputError: naming what changed.
    """
    before, now = folder.record(), describe(session)
    if before is None:
        return
    changed = [
        what
        for what, part, name in (
            ("the base model's weights", "base", "digest"),
            ("the chat template or tokenizer", "data", "encoder"),
            ("the training rows", "data", "train_digest"),
            ("the held-out rows", "data", "held_out_digest"),
        )
        if before[part][name] != now[part][name]
    ]
    if changed:
        raise OutputError(
            f"since this run began, {' and '.join(changed)} changed",
            where=str(folder.path),
            remedy="put them back to go on, or start a new run in another folder",
        )


def _base_losses(engine: Engine, rows: Rows) -> BaseLosses:
    base = engine.base
    precision = base.quantization or base.placement.dtype_name
    name = f"{rows.fingerprint()[:24]}-{base.digest[:16]}-{precision}.npy"
    path = None if base.digest == "unknown" else cache_root() / "base-losses" / name

    def measure(indices: Sequence[int]) -> Losses:
        return engine.losses([NoAdapter()], rows, indices)[0]

    return BaseLosses(measure, len(rows), path, processes=engine.processes)


def _tokenized(source: Source, data: DataConfig, encoder: ChatEncoder) -> TokenizedData:
    path = source.path
    if path == skills.EMBEDDED_NAME:
        # written anew each time: it takes a moment, and a file left by an older version must not be taken for it
        file = cache_root() / "data" / f"{skills.EMBEDDED_NAME}.jsonl"
        skills.write(file)
        path = str(file)
    return tokenize([path], encoder, split=data.split, mapping=data.mapping, workers=data.workers)


def _split(data: DataConfig, encoder: ChatEncoder, seed: int) -> tuple[Rows, Rows, list[str]]:
    """Returns training rows, held-out rows and notes; no held-out text is among the training rows."""
    places: list[tuple[TokenizedData, int]] = []
    notes = []
    for source in data.train:
        tokens = _tokenized(source, data, encoder)
        if tokens.dropped:
            notes.append(f"{source.path}: {tokens.dropped} rows lose all supervised tokens to max_length; left out")
        if tokens.truncated:
            notes.append(f"{source.path}: {tokens.truncated} rows are longer than max_length and were cut")
        places += [(tokens, row) for row in _taken(source, len(tokens), seed)]
    if data.limit is not None and data.limit < len(places):
        chosen = np.random.default_rng(key(seed, "limit")).permutation(len(places))[: data.limit]
        places = [places[i] for i in sorted(chosen)]
    if isinstance(data.held_out, str):
        other = _tokenized(Source(path=data.held_out), data, encoder)
        held = [(other, row) for row in range(len(other))]
    else:
        count = _held_out_count(data.held_out, len(places))
        out = set(np.random.default_rng(key(seed, "held out")).permutation(len(places))[:count].tolist())
        held = [place for i, place in enumerate(places) if i in out]
        places = [place for i, place in enumerate(places) if i not in out]
    kept = _without(places, held)
    if len(kept) < len(places):
        notes.append(f"{len(places) - len(kept)} training rows equal a held-out row and were left out")
    if not kept:
        raise ConfigError("no training rows are left beside the held-out ones", where="data", remedy="hold out fewer")
    return Rows(tuple(kept)), Rows(tuple(held)), notes


def _taken(source: Source, available: int, seed: int) -> Sequence[int]:
    """Returns which rows of a source are used: all, a random share, or a random number of them."""
    count = round(source.take * available) if source.take <= 1 else int(source.take)
    if count > available:
        raise ConfigError(f"asks for {count} rows but there are {available}", where=source.path, remedy="ask for fewer")
    if count == 0:
        raise ConfigError(f"a share of {source.take} of {available} rows is none", where=source.path)
    if count == available:
        return range(available)
    chosen = np.random.default_rng(key(seed, "take", source.path)).permutation(available)[:count]
    return [int(i) for i in sorted(chosen)]


def _held_out_count(wanted: float | None, available: int) -> int:
    if wanted is None:
        count = min(HELD_OUT_ROWS, available // 10)
    else:
        count = round(wanted * available) if wanted < 1 else int(wanted)
    if count == 0:
        raise ConfigError(
            f"of {available} rows none would be held out",
            where="held_out",
            remedy="give a number of rows, or a file",
        )
    if count >= available:
        raise ConfigError(
            f"{count} rows would be held out, but there are {available}", where="held_out", remedy="hold out fewer"
        )
    return count


def _without(
    places: list[tuple[TokenizedData, int]], held: list[tuple[TokenizedData, int]]
) -> list[tuple[TokenizedData, int]]:
    """Returns the places whose tokens equal no held-out row's; only rows of equal length are compared."""
    texts = {data[row].tokens_L.tobytes() for data, row in held}
    lengths = {int(data.lengths_N[row]) for data, row in held}
    return [
        (data, row)
        for data, row in places
        if int(data.lengths_N[row]) not in lengths or data[row].tokens_L.tobytes() not in texts
    ]


def _material(base: Base, train: Rows) -> Material:
    """Gathers what initialisations draw on from the first 2,000 training rows."""
    tokenizer = base.tokenizer
    size = base.model.config.get_text_config().vocab_size
    counts_V, opening = np.zeros(size, dtype=np.int64), list[int]()
    for example in islice((train[i] for i in range(len(train))), 2000):
        counts_V += np.bincount(example.tokens_L, minlength=size)[:size]
        if len(opening) < 4096:
            opening += [int(t) for t in example.tokens_L]
    return Material(
        encode=lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        opening=opening,
        counts_V=counts_V,
        bos=tokenizer.bos_token_id,
        special=frozenset(i for i in tokenizer.all_special_ids if i < size),
    )


def describe(session: Session) -> dict[str, dict[str, object]]:
    """Returns the record of data and base: what the numbers were computed from."""
    base = session.base
    tokens = {data.key for data, _ in (*session.train.places, *session.held_out.places)}
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
            "train_digest": session.train.fingerprint(),
            "held_out_rows": len(session.held_out),
            "held_out_digest": session.held_out.fingerprint(),
            "held_out_supervised_tokens": int(session.held_out.counts().sum()),
        },
        "engine": {"row_tokens": session.engine.row_tokens},
    }
