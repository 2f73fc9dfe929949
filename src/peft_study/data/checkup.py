"""What the doctor looks at in tokenised data: counts of all rows, and a look at some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.data.chat import ChatEncoder
from peft_study.data.dataset import Rows
from peft_study.data.tokens import TokenizedData
from peft_study.doctor.batches import IGNORED, LabelledRow, count_batches, unigram_loss
from peft_study.doctor.observations import DataCounts

SAMPLED = 200
"""Rows whose tokens are looked at, spread evenly: a fault of form is in every row, or in nearly every one."""


def encoder_counts(encoder: ChatEncoder) -> DataCounts:
    """Returns what is known before any row is read: BOS and the template."""
    bos = encoder.probe
    checked = None if bos is None else bos.bos_checked
    return DataCounts(
        missing_bos=encoder.missing_bos,
        bos_checked=checked,
        template=encoder.template_name,
        tuned_template=encoder.tuned_template,
        conversations=True,
    )


def file_counts(files: Sequence[TokenizedData], encoder: ChatEncoder) -> DataCounts:
    """Returns the counts of tokenised files, the rows that were dropped included."""
    rows = sum(len(data) + data.dropped for data in files)
    truncated = sum(data.truncated for data in files)
    supervised_N = np.concatenate([data.supervised_N for data in files])
    digests_N = np.concatenate([data.short_digests for data in files])
    sources = Counter(chain.from_iterable(data.sources for data in files))
    largest, count = sources.most_common(1)[0]
    known = encoder_counts(encoder)
    return replace(
        known,
        rows=rows,
        tokens=sum(int(data.lengths_N.sum()) for data in files),
        supervised=int(supervised_N.sum()),
        spread=float(supervised_N.std() / supervised_N.mean()),
        truncated=truncated,
        unsupervised=sum(data.dropped for data in files),
        max_length=encoder.max_length,
        longest=max(int(data.lengths_N.max()) for data in files),
        duplicates=len(digests_N) - len(np.unique(digests_N)),
        largest_source=(largest, count / sources.total()),
        **_looked_at(files, encoder, rows, rows - truncated),
    )


def unigram_of(train: Rows) -> float | None:
    """Returns the entropy of the supervised tokens of some rows, in nats a token; None where there are too few."""
    return unigram_loss(_sampled(list({id(data): data for data, _ in train.places}.values())))


def _sampled(files: Sequence[TokenizedData]) -> list[LabelledRow]:
    """Returns some rows, spread evenly."""
    ends = np.cumsum([len(data) for data in files])
    places = np.unique(np.linspace(0, ends[-1] - 1, min(SAMPLED, int(ends[-1]))).astype(int))
    sample = []
    for place in places.tolist():
        file = int(np.searchsorted(ends, place, side="right"))
        example = files[file][place - (int(ends[file - 1]) if file else 0)]
        labels = np.where(example.supervised_L, example.tokens_L, IGNORED)
        sample.append(LabelledRow(example.tokens_L.astype(np.int64), labels.astype(np.int64)))
    return sample


def _looked_at(files: Sequence[TokenizedData], encoder: ChatEncoder, rows: int, whole: int) -> dict[str, Any]:
    """Returns what some rows tell, as counts of all rows."""
    sample = _sampled(files)
    found = count_batches(sample, ends=encoder.ends, max_length=encoder.max_length or 2**31)
    uncut = sum(len(row.ids) < (encoder.max_length or 2**31) for row in sample)
    return {
        "double_bos": None if found.double_bos is None else round(found.double_bos / len(sample) * rows),
        "no_end": None if found.no_end is None else round(found.no_end / max(uncut, 1) * whole),
        "shifted": found.shifted,
    }


def split_counts(train: Rows, held_out: Rows, encoder: ChatEncoder) -> DataCounts:
    """Returns the counts of the files that training and held-out rows come from, and the rows that both have."""
    files = list({id(data): data for rows in (train, held_out) for data, _ in rows.places}.values())
    both = np.isin(_digests(held_out), _digests(train)).sum()
    return replace(file_counts(files, encoder), held_out_rows=len(held_out), overlap=int(both))


def _digests(rows: Rows) -> npt.NDArray[np.uint64]:
    by_file: dict[int, tuple[TokenizedData, list[int]]] = {}
    for data, row in rows.places:
        by_file.setdefault(id(data), (data, []))[1].append(row)
    return np.concatenate([data.short_digests[chosen] for data, chosen in by_file.values()])
