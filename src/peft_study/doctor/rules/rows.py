"""The examples as a set: cut, copied, shared with the held-out part, from one source, beyond the model's positions."""

from __future__ import annotations

from peft_study.doctor.diagnosis import Level, Problem, Said
from peft_study.doctor.observations import Observations
from peft_study.doctor.rule import rule
from peft_study.doctor.rules.data import MOST, SOME, data_of, percent, share_of

CUT = 0.3
"""Share of rows that are cut, from which the model learns answers that stop in the middle."""
COPIES = 0.2
"""Share of copies, from which they are no accident of a mixture (Lee et al. 2022 find 3 to 14 % in web text)."""
DOMINATING = 0.9
"""Share of rows of one source, from which a mean over all rows says little of the others."""


@rule(
    "data",
    looks_at="rows that are cut, and those that lose every supervised token to the cut",
    threshold="1 % lose all, or 30 % are cut (a note below; an error where all lose all)",
    source="a cut answer has no end token; a row that loses its answer teaches nothing",
    false_alarms="long documents whose end does not matter",
    needs=("data.truncated", "data.rows"),
    explains=("nothing_supervised",),
)
def truncated(seen: Observations) -> Problem | None:
    """The cut takes answers away."""
    data = data_of(seen)
    cut, rows = data.truncated or 0, data.rows or 0
    lost = min(data.unsupervised or 0, cut)
    if share_of(cut, rows) < SOME and not lost:
        return None
    worse = share_of(lost, rows) >= SOME or share_of(cut, rows) >= CUT
    level: Level = "error" if lost >= rows else "warning" if worse else "note"
    to = "max_length" if data.max_length is None else f"max_length {data.max_length:,}"
    if lost:
        evidence = Said(
            f"{lost:,} of {rows:,} rows ({percent(lost, rows)}) lose all supervised tokens to {to}",
            f"{rows:,} 个样本中有 {lost:,} 个因 {to} 失去全部监督标记",
        )
    else:
        evidence = Said(
            f"{to} cuts {cut:,} of {rows:,} rows ({percent(cut, rows)})",
            f"{to} 截断了 {rows:,} 个样本中的 {cut:,} 个",
        )
    return Problem(
        level=level,
        sure="certain",
        cause=Said("rows are cut", "样本被截断"),
        evidence=evidence,
        consequence=Said(
            "a cut answer ends in the middle, and a row without its answer teaches nothing",
            "被截断的回答停在中间，失去回答的样本学不到任何东西",
        ),
        change=Said(
            "raise max_length (in finetune: --max_seq_length), or leave these rows out",
            "增大 max_length（finetune 用 --max_seq_length），或去掉这些样本",
        ),
        values={"cut": cut, "lost": lost, "rows": rows, "max_length": data.max_length},
    )


@rule(
    "data",
    looks_at="rows that say the same as an earlier one, letter by letter",
    threshold="20 % of the rows (a note from 1 %)",
    source="Lee et al. 2022 (arXiv:2107.06499): 3 to 14 % near copies in web text; copies are memorised",
    false_alarms="rows that are repeated on purpose to weigh more",
    needs=("data.duplicates", "data.rows"),
    explains=("memorising",),
)
def duplicates(seen: Observations) -> Problem | None:
    """Many rows say the same."""
    data = data_of(seen)
    copies, rows = data.duplicates or 0, data.rows or 0
    share = share_of(copies, rows)
    if share < SOME:
        return None
    return Problem(
        level="warning" if share >= COPIES else "note",
        sure="certain",
        cause=Said("rows say the same as earlier ones", "有样本与前面的样本相同"),
        evidence=Said(
            f"{copies:,} of {rows:,} rows ({percent(copies, rows)}) are copies",
            f"{rows:,} 个样本中有 {copies:,} 个是重复的",
        ),
        consequence=Said(
            "they weigh more than the others, and are learned by heart", "它们的权重高于其他样本，并且会被背下来"
        ),
        change=Said("keep one of each, unless the weight is meant", "每种只留一个，除非有意加权"),
        paste="rows = list({str(row): row for row in rows}.values())",
        values={"copies": copies, "rows": rows},
    )


@rule(
    "data",
    looks_at="held-out rows that are training rows, too",
    threshold="1 % of the held-out rows (a note below; an error from half)",
    source="a held-out loss measures new rows; here no two parts share a row",
    false_alarms="short rows that are alike by nature, such as yes and no",
    needs=("data.overlap", "data.held_out_rows"),
    explains=("memorising",),
)
def overlap(seen: Observations) -> Problem | None:
    """Held-out rows are trained on."""
    data = data_of(seen)
    both, rows = data.overlap or 0, data.held_out_rows or 0
    share = share_of(both, rows)
    if not share:
        return None
    return Problem(
        level="error" if share >= MOST else "warning" if share >= SOME else "note",
        sure="certain",
        cause=Said("held-out rows are trained on", "留出的样本也参与了训练"),
        evidence=Said(
            f"{both:,} of {rows:,} held-out rows ({percent(both, rows)}) are training rows, too",
            f"{rows:,} 个留出样本中有 {both:,} 个也在训练集里",
        ),
        consequence=Said(
            "the held-out loss looks better than the model is, and hides overfitting",
            "留出损失会显得比实际更好，并且掩盖过拟合",
        ),
        change=Said("take them out of the training rows", "把它们从训练集里去掉"),
        paste="train = [row for row in train if row not in held_out]",
        values={"rows": both, "held_out": rows},
    )


@rule(
    "data",
    looks_at="the largest of several sources",
    threshold="90 % of the rows",
    source="a mean over rows is then the mean of that source",
    false_alarms="a mixture that is meant so: it is a note",
    needs=("data.largest_source",),
)
def one_source(seen: Observations) -> Problem | None:
    """One source of several makes nearly all of the data."""
    assert data_of(seen).largest_source is not None
    name, share = data_of(seen).largest_source or ("", 0.0)
    if not DOMINATING <= share < 1:
        return None
    return Problem(
        level="note",
        sure="certain",
        cause=Said("one source makes nearly all of the data", "一个来源几乎占了全部数据"),
        evidence=Said(f"{share:.1%} of the rows come from {name}", f"{share:.1%} 的样本来自 {name}"),
        consequence=Said(
            "the loss is this source's; what the others learn does not show in it",
            "损失反映的是这个来源；其他来源学得如何看不出来",
        ),
        change=Said(
            "take a share of it (take: in the source), or look at each source's loss",
            "只取一部分（来源里的 take），或分别看每个来源的损失",
        ),
        values={"source": name, "share": share},
    )


@rule(
    "data",
    looks_at="tokens of the longest row with the virtual ones, against the model's positions",
    threshold="more than it can compute (error), or than it was made for (warning)",
    source="the model's configuration: rows of its position table, max_position_embeddings",
    false_alarms="a model whose rotary positions were stretched without a word in its configuration",
    needs=("data.longest",),
)
def past_positions(seen: Observations) -> Problem | Said | None:
    """Rows are longer than the model's positions."""
    data = data_of(seen)
    virtual, longest = data.virtual_tokens or 0, data.longest or 0
    if data.positions is None and data.context is None:
        return Said("not known: how many positions the model has", "未知：模型的位置数")
    need = longest + virtual
    hard = data.positions is not None and need > data.positions
    limit = data.positions if hard else data.context
    if limit is None or need <= limit:
        return None
    beside, beside_zh = (f" and {virtual:,} virtual tokens", f"加 {virtual:,} 个虚拟标记") if virtual else ("", "")
    fewer, fewer_zh = ("use fewer virtual tokens, or ", "减少虚拟标记，或") if virtual else ("", "")
    shorter = f"a max_length of {limit - virtual:,} or less" if limit > virtual else "shorter rows"
    shorter_zh = f"把 max_length 设为 {limit - virtual:,} 以下" if limit > virtual else "缩短样本"
    what = "has" if hard else "was made for"
    return Problem(
        level="error" if hard else "warning",
        sure="certain",
        cause=Said(
            "rows are longer than " + ("the model's positions" if hard else "the model was made for"),
            "样本超出了模型的位置数",
        ),
        evidence=Said(
            f"the longest example's {longest:,} tokens{beside} need {need:,} positions, the model {what} {limit:,}",
            f"最长样本的 {longest:,} 个标记{beside_zh}需要 {need:,} 个位置，模型只有 {limit:,} 个",
        ),
        consequence=Said(
            "it cannot compute them" if hard else "it computes them, but its answers there may be poor",
            "模型无法计算" if hard else "模型可以计算，但超出部分的回答可能很差",
        ),
        change=Said(f"{fewer}give {shorter}" if limit > virtual else f"{fewer}{shorter}", f"{fewer_zh}{shorter_zh}"),
        values={"longest": longest, "virtual": virtual, "limit": limit},
    )
