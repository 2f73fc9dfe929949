"""What trains: the adapter and nothing else."""

from __future__ import annotations

from peft_study.doctor.diagnosis import Problem, Said
from peft_study.doctor.observations import Observations
from peft_study.doctor.rule import rule


@rule(
    "weights",
    looks_at="numbers of base and adapter that train; PEFT configurations that belong to no model",
    threshold="an adapter is wanted, and there is none",
    source="shizhengLi/PEFT, commit 0b8506f: a PromptTuningConfig was made, get_peft_model never called",
    false_alarms="a configuration that is kept for a later model of the same process",
    needs=("parameters",),
    explains=(
        "rate_too_high",
        "rate_too_low",
        "rising",
        "diverged",
        "too_hot",
        "overfitting",
        "updates_below_precision",
    ),
)
def not_attached(seen: Observations) -> Problem | None:
    """The adapter was never attached, so that the base trains."""
    counts = seen.parameters
    assert counts is not None
    wanted = counts.unattached or (seen.settings.method if seen.settings.method not in (None, "full") else None)
    if counts.adapter or not counts.base_trainable or wanted is None:
        return None
    return Problem(
        level="error",
        sure="likely" if counts.unattached else "certain",
        cause=Said("the adapter was never attached to the model", "适配器没有挂到模型上"),
        evidence=Said(
            f"{wanted} was asked for, but the model has no adapter, and {counts.base_trainable:,} of "
            f"{counts.base:,} numbers of the base train",
            f"要用的是 {wanted}，但模型里没有适配器；基座的 {counts.base:,} 个参数中有 "
            f"{counts.base_trainable:,} 个在训练",
        ),
        consequence=Said(
            "this is full fine-tuning: at a rate meant for an adapter it damages the base, and the loss may rise",
            "这实际上是全参数微调：用适配器的学习率会损坏基座，损失可能上升",
        ),
        change=Said("attach it before the optimizer is made", "在创建优化器之前挂上适配器"),
        paste="model = get_peft_model(model, peft_config)",
        values={"base": counts.base, "base_trainable": counts.base_trainable, "wanted": wanted},
    )


@rule(
    "weights",
    looks_at="numbers of the base that train beside an adapter",
    threshold="any number of the base that the method does not train itself",
    source="peft saves an adapter's own numbers only (save_and_load.py)",
    false_alarms="layers of the base that are trained beside the adapter on purpose, and saved by hand",
    needs=("parameters",),
    explains=("rate_too_high", "rising", "diverged", "too_hot", "overfitting", "updates_below_precision"),
)
def base_trains(seen: Observations) -> Problem | None:
    """An adapter is attached, but weights of the base train too."""
    counts = seen.parameters
    assert counts is not None
    if not counts.adapter or not counts.base_trainable or counts.own_base:
        return None
    first = f" ({counts.first_unexpected}, ...)" if counts.first_unexpected else ""
    return Problem(
        level="error",
        sure="certain",
        cause=Said("weights of the base train beside the adapter", "除适配器外，基座的权重也在训练"),
        evidence=Said(
            f"{counts.base_trainable:,} of {counts.base:,} numbers of the base train{first}, beside "
            f"{counts.adapter_trainable:,} of the adapter",
            f"基座的 {counts.base:,} 个参数中有 {counts.base_trainable:,} 个在训练{first}，"
            f"适配器有 {counts.adapter_trainable:,} 个",
        ),
        consequence=Said(
            "an adapter's rate damages the base, and what the base learns is not saved with the adapter",
            "适配器的学习率会损坏基座，而且基座学到的内容不会随适配器保存",
        ),
        change=Said(
            "freeze the base; name a layer that is meant to train in modules_to_save",
            "冻结基座；确实要训练的层请写进 modules_to_save",
        ),
        paste="base.requires_grad_(False)\nmodel = get_peft_model(base, peft_config)  # after it, not before",
        values={"base_trainable": counts.base_trainable, "first": counts.first_unexpected},
    )


@rule(
    "weights",
    looks_at="numbers of the adapter that train",
    threshold="none of them trains",
    source="peft freezes an adapter that is loaded without is_trainable=True, or made with inference_mode=True",
    false_alarms="an adapter that is looked at for inference",
    needs=("parameters",),
    explains=("nothing_trains", "base_trains", "untouched", "never_learned", "rate_too_high", "rate_too_low"),
)
def adapter_frozen(seen: Observations) -> Problem | None:
    """The adapter is attached, but frozen."""
    counts = seen.parameters
    assert counts is not None
    if not counts.adapter or counts.adapter_trainable:
        return None
    if counts.base_trainable:
        beside = Said(
            f"{counts.base_trainable:,} numbers of the base train instead",
            f"反而是基座的 {counts.base_trainable:,} 个参数在训练",
        )
    else:
        beside = Said("nothing trains", "没有任何参数在训练")
    return Problem(
        level="error",
        sure="certain",
        cause=Said("the adapter is attached, but frozen", "适配器已挂上，但被冻结了"),
        evidence=Said(
            f"none of the adapter's {counts.adapter:,} numbers trains; {beside.en}",
            f"适配器的 {counts.adapter:,} 个参数都不训练；{beside.zh}",
        ),
        consequence=Said("the adapter stays as it is", "适配器不会有任何变化"),
        change=Said(
            "load it with is_trainable=True, or make its configuration with inference_mode=False",
            "加载时加 is_trainable=True，或在配置里设 inference_mode=False",
        ),
        paste="model = PeftModel.from_pretrained(base, folder, is_trainable=True)",
        values={"adapter": counts.adapter, "base_trainable": counts.base_trainable},
    )


@rule(
    "weights",
    looks_at="numbers that train",
    threshold="none",
    source="nothing to optimize",
    false_alarms="a model that is looked at for inference",
    needs=("parameters",),
    explains=("untouched", "never_learned", "rate_too_high", "rate_too_low", "too_few_steps"),
)
def nothing_trains(seen: Observations) -> Problem | None:
    """No number of the model trains."""
    counts = seen.parameters
    assert counts is not None
    if counts.base_trainable or counts.adapter_trainable:
        return None
    made = counts.unattached
    return Problem(
        level="error",
        sure="certain",
        cause=Said("nothing trains", "没有任何参数在训练"),
        evidence=Said(
            f"all {counts.base + counts.adapter:,} numbers are frozen"
            + (f", and a {made} was made but not attached" if made else ""),
            f"全部 {counts.base + counts.adapter:,} 个参数都被冻结" + (f"，而且 {made} 创建后没有挂上" if made else ""),
        ),
        consequence=Said("training stops with an error, or changes nothing", "训练会报错，或不产生任何变化"),
        change=Said("attach an adapter, or unfreeze what is to train", "挂上适配器，或解冻要训练的参数"),
        paste="model = get_peft_model(model, peft_config)",
        values={"numbers": counts.base + counts.adapter},
    )


_UNTOUCHED = {
    "lora": Said("every B of LoRA is zero, so that the update is zero", "LoRA 的 B 全为零，更新量为零"),
    "prompt_tuning": Said("the prompt equals its initialisation", "提示向量与初始值完全相同"),
    "prefix_tuning": Said("the prefix equals its initialisation", "前缀与初始值完全相同"),
}


@rule(
    "weights",
    looks_at="weights after training, against their initialisation",
    threshold="no number differs",
    source="peft's initialisations: B of LoRA is zero, a prompt from text is rows of the embedding table",
    false_alarms="an adapter that was saved before its first step on purpose",
    needs=("adapter.untouched",),
)
def untouched(seen: Observations) -> Problem | None:
    """An adapter was saved or has finished training, but equals its initialisation."""
    assert seen.adapter is not None
    if not seen.adapter.untouched or seen.stage == "before":
        return None
    method = seen.settings.method or ""
    steps = f" after {seen.steps_done:,} steps" if seen.steps_done else ""
    steps_zh = f"训练 {seen.steps_done:,} 步后，" if seen.steps_done else ""
    said = _UNTOUCHED.get(method, Said("no number that trains has changed", "没有任何训练参数发生变化"))
    return Problem(
        level="error",
        sure="certain",
        cause=Said("the adapter has learned nothing", "适配器什么也没学到"),
        evidence=Said(f"{said.en}{steps}", f"{steps_zh}{said.zh}"),
        consequence=Said("it answers as the base does, or as its random start", "它的回答与基座（或随机初始值）相同"),
        change=Said(
            "check that the optimizer holds the adapter's parameters, that the rate is not 0, and that the trained "
            "model is the one that was saved",
            "检查优化器里是否有适配器的参数、学习率是否为 0，以及保存的是否是训练过的模型",
        ),
        paste="optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)",
        values={"method": seen.settings.method, "steps": seen.steps_done},
        step=seen.steps_done,
    )


@rule(
    "weights",
    looks_at="NaN and infinity among the weights",
    threshold="one number",
    source="no later step repairs it",
    false_alarms="none known",
    needs=("adapter.bad",),
)
def bad_weights(seen: Observations) -> Problem | None:
    """Weights hold NaN or infinity."""
    assert seen.adapter is not None
    names = seen.adapter.bad
    if not names:
        return None
    return Problem(
        level="error",
        sure="certain",
        cause=Said("weights hold NaN or infinity", "权重里有 NaN 或无穷大"),
        evidence=Said(f"{len(names)} tensors, the first: {names[0]}", f"共 {len(names)} 个张量，第一个是 {names[0]}"),
        consequence=Said("every output of the model is NaN", "模型的所有输出都是 NaN"),
        change=Said(
            "go back to a checkpoint before it, with a lower rate, gradient clipping, and bf16 instead of fp16",
            "回到出问题之前的检查点，降低学习率、启用梯度裁剪，并用 bf16 代替 fp16",
        ),
        paste="TrainingArguments(..., max_grad_norm=1.0, bf16=True, fp16=False)",
        values={"tensors": list(names[:8]), "count": len(names)},
    )


@rule(
    "weights",
    looks_at="embedding tables of the base in an adapter's file",
    threshold="a table that modules_to_save does not name",
    source="peft, save_embedding_layers='auto': saved where target_modules names them or the vocabulary grew",
    false_alarms="a vocabulary that was extended: its new rows must be saved",
    needs=("adapter.embeddings",),
)
def embeddings_saved(seen: Observations) -> Problem | None:
    """Embedding tables of the base were saved with the adapter."""
    assert seen.adapter is not None
    size, whole = seen.adapter.embeddings, seen.adapter.bytes
    if not size:
        return None
    share = f" of {whole / 1e6:,.1f} MB" if whole else ""
    share_zh = f"（文件共 {whole / 1e6:,.1f} MB）" if whole else ""
    return Problem(
        level="warning",
        sure="likely",
        cause=Said("embedding tables of the base were saved with the adapter", "基座的嵌入表随适配器一起保存了"),
        evidence=Said(f"{size / 1e6:,.1f} MB{share} are embedding tables", f"嵌入表占 {size / 1e6:,.1f} MB{share_zh}"),
        consequence=Said(
            "a large file, and a table that replaces the base's own where the adapter is loaded",
            "文件很大，而且加载时会替换基座自己的嵌入表",
        ),
        change=Said("save it without them, unless the vocabulary was extended", "如果没有扩充词表，保存时不要带上它们"),
        paste="model.save_pretrained(folder, save_embedding_layers=False)",
        values={"embeddings": size, "bytes": whole},
    )


@rule(
    "weights",
    looks_at="the base that an adapter's configuration names, where it is a path",
    threshold="no model folder there",
    source="peft loads the base from base_model_name_or_path",
    false_alarms="an adapter that was made on another machine",
    needs=("adapter.base_found",),
)
def base_not_found(seen: Observations) -> Problem | None:
    """The base that the configuration names does not exist."""
    assert seen.adapter is not None
    if seen.adapter.base_found is not False:
        return None
    return Problem(
        level="warning",
        sure="certain",
        cause=Said("the base that the adapter names does not exist", "适配器所指的基座不存在"),
        evidence=Said(
            f"base_model_name_or_path is {seen.adapter.base!r}, and there is no model at that path",
            f"base_model_name_or_path 是 {seen.adapter.base!r}，该处没有模型",
        ),
        consequence=Said("the adapter cannot be loaded by its name alone", "只凭适配器文件夹无法加载"),
        change=Said(
            "write the base's hub name or its right path into adapter_config.json",
            "在 adapter_config.json 里写上基座的 hub 名称或正确路径",
        ),
        paste='"base_model_name_or_path": "ORGANISATION/MODEL"',
        values={"base": seen.adapter.base},
    )


@rule(
    "weights",
    looks_at="adapter_config.json against the shapes and names of the weights, and the base's config.json",
    threshold="one contradiction",
    source="peft builds the adapter by the configuration, and loads the weights by name and shape",
    false_alarms="none known",
    needs=("adapter.differences",),
)
def config_differs(seen: Observations) -> Problem | None:
    """The configuration says something else than the weights."""
    assert seen.adapter is not None
    lines = seen.adapter.differences
    if not lines:
        return None
    more = f" (+{len(lines) - 3})" if len(lines) > 3 else ""
    found = "; ".join(lines[:3]) + more
    found_zh = found.replace("config:", "配置:").replace("weights:", "权重:").replace("base:", "基座:")
    return Problem(
        level="error",
        sure="certain",
        cause=Said("the configuration contradicts the weights", "配置与权重互相矛盾"),
        evidence=Said(found, found_zh),
        consequence=Said(
            "the adapter cannot be loaded, or parts of it start anew, untrained",
            "适配器无法加载，或其中一部分变成未训练的初始值",
        ),
        change=Said(
            "put the adapter_config.json back that was saved with these weights",
            "换回与这些权重一起保存的 adapter_config.json",
        ),
        values={"differences": list(lines)},
    )


_MOST_UNMOVED = 0.9
"""Share of numbers that a step leaves as they are from which training is said to stand still."""


@rule(
    "weights",
    looks_at="the peak rate against the spacing of the weights' dtype at each weight's size",
    threshold=f"a step of AdamW (at most the rate) is under half the spacing for {_MOST_UNMOVED:.0%} of the numbers",
    source="rounding to nearest: bf16 keeps 8 bits, fp16 11; arXiv 2010.06192 on training in bf16 alone",
    false_alarms="optimizers that round stochastically or keep float32 copies of the weights",
    needs=("parameters.unmoved",),
    explains=("never_learned", "too_cold", "untouched"),
)
def updates_below_precision(seen: Observations) -> Problem | None:
    """Updates are smaller than the dtype of the weights can hold."""
    counts, settings = seen.parameters, seen.settings
    assert counts is not None
    assert counts.unmoved is not None
    if not counts.unmoved >= _MOST_UNMOVED:
        return None
    dtype, rate = settings.parameter_dtype or "", settings.learning_rate
    at = f" at rate {rate:g}" if rate else ""
    at_zh = f"学习率 {rate:g} 时，" if rate else ""
    return Problem(
        level="warning",
        sure="likely",
        cause=Said(
            f"updates are below the precision of {dtype or 'the weights'}", f"更新量小于 {dtype or '权重'} 的精度"
        ),
        evidence=Said(
            f"{counts.unmoved:.0%} of the numbers that train stay as they are after a step{at}",
            f"{at_zh}一步之后 {counts.unmoved:.0%} 的训练参数保持不变",
        ),
        consequence=Said("most of each step is lost to rounding", "每一步的大部分更新在舍入中丢失"),
        change=Said(
            "keep the weights that train in float32, and compute in bfloat16",
            "训练的权重用 float32，计算用 bfloat16",
        ),
        paste="model = AutoModelForCausalLM.from_pretrained(..., dtype=torch.float32)  # TrainingArguments(bf16=True)",
        values={"unmoved": counts.unmoved, "rate": rate, "dtype": settings.parameter_dtype},
    )
