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
    explains=("rate_too_high", "rate_too_low", "rising", "diverged"),
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
