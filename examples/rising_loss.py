"""The loss rises, and nothing says why: a PromptTuningConfig was made, and never attached to the model.

python examples/rising_loss.py                       as it was: the doctor stops it before step 1
python examples/rising_loss.py --attach              attached, at a rate that teaches a soft prompt nothing
python examples/rising_loss.py --attach --rate 0.1   as it should be
"""

import argparse

from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_study.data import skills
from peft_study.doctor.callback import DoctorCallback
from peft_study.errors import UserError
from peft_study.model.load import resolve_model

PROMPT = {
    "num_virtual_tokens": 8,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "Answer the question in one line",
}
USUAL = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}


def encode(tokenizer, question, answer):
    """Returns one example; only its answer counts in the loss."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


def train(base, *, attach=False, rate=1e-4, steps=60, callbacks=(), output="rising-loss"):
    """Trains, and returns the trainer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = PromptTuningConfig(task_type="CAUSAL_LM", tokenizer_name_or_path=base, **PROMPT)
    if attach:
        model = get_peft_model(model, config)  # the line that was missing
    rows = [encode(tokenizer, *(turn.content for turn in row.messages)) for row in skills.generate(4 * steps)]
    arguments = TrainingArguments(
        output, learning_rate=rate, max_steps=steps, train_sampling_strategy="sequential", **USUAL
    )
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), rows, callbacks=list(callbacks))
    trainer.train()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attach", action="store_true")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=60)
    try:
        train(str(resolve_model("smollm2-135m-instruct")), **vars(parser.parse_args()), callbacks=[DoctorCallback()])
    except UserError as error:
        raise SystemExit(str(error)) from None
