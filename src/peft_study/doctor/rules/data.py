"""The examples as text: whether they have the form that the model knows, and labels for what it is to learn."""

from __future__ import annotations

from peft_study.doctor.diagnosis import Level, Problem, Said
from peft_study.doctor.observations import DataCounts, Observations
from peft_study.doctor.rule import rule

SOME, MOST = 0.01, 0.5
"""Shares of rows: one in a hundred is worth a word, half of them is the data itself."""


def data_of(seen: Observations) -> DataCounts:
    """Returns what is known of the data; a rule that needs it is not asked without."""
    assert seen.data is not None
    return seen.data


def share_of(part: int | None, whole: int | None) -> float:
    """Returns a share; 0 where one of the two is not known or makes no sense."""
    return part / whole if part and whole and whole > 0 else 0.0


def percent(part: int, whole: int) -> str:
    """Returns a share in words."""
    return f"{part / whole:.1%}" if part * 1000 >= whole else "less than 0.1%"


@rule(
    "data",
    looks_at="the chat template of the examples, and the tokenizer's own",
    threshold="they are not the same text",
    source="open-instruct trains base models with tulu's template; a tuned model has its own in tokenizer_config.json",
    false_alarms="a new template on purpose: it is a note",
    needs=("data.template", "data.tuned_template"),
)
def template_differs(seen: Observations) -> Problem | None:
    """The model was tuned with another chat template."""
    data = data_of(seen)
    if data.template == data.tuned_template:
        return None
    return Problem(
        level="note",
        sure="certain",
        cause=Said("the chat template is not the model's own", "对话模板不是模型自带的"),
        evidence=Said(
            f"rows are written with {data.template}, the model was tuned with {data.tuned_template}",
            f"样本使用 {data.template}，模型调优时用的是 {data.tuned_template}",
        ),
        consequence=Said(
            "training starts at a higher loss and teaches the form first; small adapters and prompts pay most",
            "训练从较高的损失开始，并且要先学会格式；小的适配器和提示向量受影响最大",
        ),
        change=Said(
            "take the tokenizer's own (data.chat_template: null; in finetune --chat_template own), "
            "unless the other is wanted",
            "除非确实要用别的模板，否则使用分词器自带的（data.chat_template: null；finetune 用 --chat_template own）",
        ),
        values={"template": data.template, "own": data.tuned_template},
    )


@rule(
    "data",
    looks_at="the first token of the examples, and of a text as the tokenizer encodes it by itself",
    threshold="the tokenizer puts BOS first, the examples do not begin with it",
    source="a model reads what it read in training; with Llama and Gemma BOS is the attention sink",
    false_alarms="a tuned model whose own template leaves BOS out on purpose",
    needs=("data.bos_checked",),
)
def missing_bos(seen: Observations) -> Problem | None:
    """Examples do not begin with BOS."""
    bos = data_of(seen).missing_bos
    if bos is None:
        return None
    return Problem(
        level="warning",
        sure="certain",
        cause=Said("no example begins with BOS", "样本开头没有 BOS"),
        evidence=Said(
            f"the tokenizer puts {bos!r} before a text by itself, and the chat template does not write it",
            f"分词器会自动在文本前加 {bos!r}，而对话模板没有写它",
        ),
        consequence=Said("the model reads texts unlike those of its training", "模型读到的文本与它训练时的不同"),
        change=Said(
            "put it first: data.add_bos: true (in finetune: --add_bos)",
            "在开头加上：data.add_bos: true（finetune 用 --add_bos）",
        ),
        values={"bos": bos},
    )


@rule(
    "data",
    looks_at="the first two tokens of the examples",
    threshold="both are BOS, in one row of a hundred",
    source="a template that writes BOS, tokenised with add_special_tokens (transformers' notes on chat templates)",
    false_alarms="none known",
    needs=("data.double_bos", "data.rows"),
)
def double_bos(seen: Observations) -> Problem | None:
    """Examples begin with two BOS tokens."""
    data = data_of(seen)
    found, rows = data.double_bos or 0, data.rows or 0
    if share_of(found, rows) < SOME:
        return None
    return Problem(
        level="warning",
        sure="certain",
        cause=Said("examples begin with two BOS tokens", "样本开头有两个 BOS"),
        evidence=Said(f"{found:,} of {rows:,} rows", f"{rows:,} 个样本中有 {found:,} 个"),
        consequence=Said("the model reads texts unlike those of its training", "模型读到的文本与它训练时的不同"),
        change=Said(
            "tokenise the text of the chat template without special tokens",
            "对话模板生成的文本，分词时不要再加特殊标记",
        ),
        paste="tokenizer(text, add_special_tokens=False)",
        values={"rows": found},
    )


@rule(
    "data",
    looks_at="the last supervised tokens of rows that are whole",
    threshold="half of the rows have no end token there (a note from 1 %)",
    source="a model that never learns the end token writes on to the limit",
    false_alarms="plain text that is meant to go on",
    needs=("data.no_end", "data.rows"),
)
def no_end_token(seen: Observations) -> Problem | None:
    """Answers end without an end token that is learned."""
    data = data_of(seen)
    found, whole = data.no_end or 0, (data.rows or 0) - (data.truncated or 0)
    share = share_of(found, whole)
    if share < SOME:
        return None
    return Problem(
        level="warning" if share >= MOST else "note",
        sure="certain" if share >= MOST else "likely",
        cause=Said("no end token is learned", "没有学习结束标记"),
        evidence=Said(
            f"the last supervised token of {found:,} of {whole:,} whole rows is no end token",
            f"{whole:,} 个完整样本中，有 {found:,} 个的最后一个监督标记不是结束标记",
        ),
        consequence=Said("the model does not know when to stop", "模型不知道何时停止"),
        change=Said(
            "end each answer with the end token and leave its label in; pad with another token than EOS",
            "每个回答以结束标记收尾，并保留它的标签；填充标记不要用 EOS",
        ),
        paste='tokenizer.pad_token = "<|pad|>"  # not tokenizer.eos_token, whose labels collators set to -100',
        values={"rows": found, "whole": whole},
    )


@rule(
    "data",
    looks_at="labels against the tokens of the same and of the neighbouring places",
    threshold="labels equal the next or previous tokens, not those of their own place",
    source="transformers shifts labels inside the model (ForCausalLMLoss)",
    false_alarms="a model of your own that does not shift",
    needs=("data.shifted",),
    explains=("init_wrecks", "wrong_labels", "rising", "never_learned", "no_end_token"),
)
def labels_shifted(seen: Observations) -> Problem | None:
    """Labels were shifted before the model shifts them."""
    if not data_of(seen).shifted:
        return None
    return Problem(
        level="error",
        sure="likely",
        cause=Said("labels are shifted twice", "标签被移位了两次"),
        evidence=Said(
            "labels stand one place off their tokens, and the model shifts them by one more",
            "标签与对应标记错开一位，而模型内部还会再移一位",
        ),
        consequence=Said("the model learns to predict a wrong token at each place", "模型在每个位置学的都是错误的标记"),
        change=Said("give labels that equal the inputs", "标签应与输入相同"),
        paste="labels = input_ids.clone()",
    )


@rule(
    "data",
    looks_at="supervised tokens, as a share of all",
    threshold="all of them, or any of padding",
    source="InstructGPT, Tulu and open-instruct learn answers alone; method_comparison of peft learns whole rows",
    false_alarms="plain text, or prompts that are learned on purpose: where rows are not known as chats it is a note",
    needs=("data.supervised", "data.tokens", "data.rows"),
)
def nothing_masked(seen: Observations) -> Problem | None:
    """Prompts are learned like answers."""
    data = data_of(seen)
    supervised, tokens, padding = data.supervised or 0, data.tokens or 0, data.padding or 0
    # nothing predicts the first token of a row
    whole = supervised > 0 and supervised >= tokens - (data.rows or 0) and data.conversations is not False
    if not whole and not padding:
        return None
    bad = bool(data.conversations or padding)
    evidence = Said(
        f"{supervised:,} of {tokens:,} tokens are supervised", f"{tokens:,} 个标记中有 {supervised:,} 个参与监督"
    )
    if padding:
        evidence = Said(
            f"{evidence.en}, and {padding:,} of padding beside them", f"{evidence.zh}，另有 {padding:,} 个填充标记"
        )
    return Problem(
        level="warning" if bad else "note",
        sure="likely" if bad else "possible",
        cause=Said(
            "padding is learned: its labels are not masked"
            if padding
            else "prompts are learned like answers: no label is masked",
            "填充标记也在学习：标签没有屏蔽" if padding else "提示也被当作回答学习：没有屏蔽任何标签",
        ),
        evidence=evidence,
        consequence=Said(
            "a part of the training goes into the text of prompts, and the loss says little of the answers",
            "一部分训练用在了提示文本上，损失也难以反映回答的好坏",
        ),
        change=Said(
            "set the labels of prompts to -100, unless plain text is to be learned",
            "把提示部分的标签设为 -100，除非就是要学习普通文本",
        ),
        paste="SFTConfig(..., assistant_only_loss=True)  # or completion_only_loss=True",
        values={"supervised": supervised, "tokens": tokens},
    )


@rule(
    "data",
    looks_at="rows without a supervised token that were not cut",
    threshold="1 % of the rows (a note below; an error where it is all)",
    source="such a row costs time and teaches nothing; a batch of such rows has a loss of NaN",
    false_alarms="none known",
    needs=("data.unsupervised", "data.rows"),
    explains=("never_learned", "no_end_token"),
)
def nothing_supervised(seen: Observations) -> Problem | None:
    """Rows have nothing to learn."""
    data = data_of(seen)
    empty, rows = (data.unsupervised or 0) - (data.truncated or 0), data.rows or 0
    if data.supervised == 0 and rows and not data.truncated:
        empty = rows
    if empty <= 0 or not rows:
        return None
    level: Level = "error" if empty >= rows else "warning" if share_of(empty, rows) >= SOME else "note"
    return Problem(
        level=level,
        sure="certain",
        cause=Said(
            "nothing is supervised" if level == "error" else "some rows have nothing to learn",
            "没有任何监督标记" if level == "error" else "有些样本没有可学的内容",
        ),
        evidence=Said(
            f"{empty:,} of {rows:,} rows ({percent(empty, rows)}) have no supervised token",
            f"{rows:,} 个样本中有 {empty:,} 个没有监督标记",
        ),
        consequence=Said("nothing is learned from them", "从这些样本学不到任何东西"),
        change=Said(
            "check the chat template and how answers are found in it", "检查对话模板，以及回答在其中是如何定位的"
        ),
        values={"rows": empty},
    )
