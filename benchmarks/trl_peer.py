"""TRL's SFTTrainer with peft, at its defaults and at the best settings that were found for it.

TRL is given our tokens and, as `assistant_masks`, our mask: SFTTrainer builds the labels of `assistant_only_loss` from
that column. (Told `assistant_only_loss=True` it would render the conversations itself, with a template that has
generation tags; the tokens would be the same, and reading them is no part of what is timed.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from common import synchronize
from peers import LEARNING_RATE, Pass, copy_numbers, peft_config
from worlds import MAX_LENGTH, World

from peft_study.config import MethodConfig
from peft_study.data.conversation import Example
from peft_study.methods import Adapter

SILENT: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
"""What is no training: progress bars, services, checkpoints at the end."""

DEFAULT: dict[str, dict[str, Any]] = {
    "lora": {},
    "prompt_tuning": {},
    # as it comes it fails: recomputed layers lose the prefix ("past_key_values=None") and its mask no longer fits
    "prefix_tuning": {"gradient_checkpointing": False},
}
"""SFTConfig as it comes (TRL 1.16): batches of 8 in random order, gradient checkpointing, bf16 autocast over weights
that SFTTrainer loads in float32."""

LEAN: dict[str, Any] = {
    "weights": "bfloat16",
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "logging_steps": 100_000,
}
"""What its best does without: nothing is recomputed, logged, or kept in float32 that need not be."""

# one example at a time, eight to an optimizer step: on two cores no padding is worth more than larger products
_ONE_BY_ONE: dict[str, Any] = {
    **LEAN,
    "attention": "eager",  # the fused kernel is slower on CPU for examples of this length, backward above all
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
}


def best(device: str, method: str) -> dict[str, Any]:
    """Returns the best settings that were found (`benchmarks/trl_best.py` is the search); on CUDA, not searched yet."""
    if device != "cuda":
        # a soft prompt is cast to the base's precision as it enters; LoRA's float32 matrices want the autocast
        return _ONE_BY_ONE if method == "lora" else {**_ONE_BY_ONE, "bf16": False}
    liger = {"use_liger_kernel": True} if importlib.util.find_spec("liger_kernel") else {}
    if method == "lora" and importlib.util.find_spec("flash_attn"):
        # eight rows of 1,024 tokens, flattened into one
        packed = {"packing": True, "attention": "flash_attention_2", "per_device_train_batch_size": 8}
        return {**LEAN, **liger, **packed}
    grouped = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 16}
    return {**LEAN, **liger, **grouped}


class TrlPeer:
    """SFTTrainer; one `train()` is one pass.

    Args:
        name: of the peer.
        world: gives model and tokenizer.
        config: the method.
        adapter: ours, whose numbers are copied; None keeps those that peft begins with.
        examples: the pool.
        settings: of SFTConfig; `weights` is the precision of the base (None: float32, SFTTrainer's default) and
            `attention` its implementation.
    """

    def __init__(
        self,
        name: str,
        world: World,
        config: MethodConfig,
        adapter: Adapter | None,
        examples: Sequence[Example],
        settings: dict[str, Any],
    ) -> None:
        import datasets
        from trl import SFTConfig

        self.name, self.settings, self._device = name, dict(settings), world.placement.device
        self._seen: list[tuple[Any, ...]] = []
        self._times: list[float] = []
        self._cpu: list[float] = []
        chosen = dict(settings)
        weights, attention = chosen.pop("weights", None), chosen.pop("attention", None)
        rows = [
            {"input_ids": e.tokens_L.tolist(), "assistant_masks": e.supervised_L.astype(int).tolist()} for e in examples
        ]
        trainer, clock = _watching(self)
        with _quiet():
            model = world.model(getattr(torch, weights or "float32"))
            if attention:
                model.set_attn_implementation(attention)
            self._folder = tempfile.TemporaryDirectory()
            self._trainer = trainer(
                model=model,
                args=SFTConfig(
                    self._folder.name,
                    num_train_epochs=1,
                    learning_rate=LEARNING_RATE,
                    use_cpu=self._device.type == "cpu",
                    **{"max_length": MAX_LENGTH, **SILENT, **chosen},
                ),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=world.tokenizer(),
                peft_config=peft_config(config),
                callbacks=[clock],
            )
            if adapter is not None:
                copy_numbers(self._trainer.model, adapter)
        given = self._trainer.args
        for field in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "bf16",
            "packing",
            "optim",
            "train_sampling_strategy",
        ):
            self.settings[field] = str(getattr(given, field)) if field == "optim" else getattr(given, field)
        self.settings["weights"] = weights or "float32"

    def saw(self, labels: Any, mask: Any, loss: Any, items: Any) -> None:
        """Notes what a batch holds; nothing is awaited while it runs."""
        tokens = mask.sum() if mask is not None else labels.numel()
        self._seen.append((tokens, (labels != -100).sum(), labels.numel(), loss.detach(), items))

    def tick(self) -> None:
        """Notes the time, once the device has done what it was given."""
        synchronize(self._device)
        self._times.append(time.perf_counter())
        self._cpu.append(time.process_time())

    def run(self) -> Pass:
        """Runs one `train()`, an epoch."""
        self._seen.clear()
        self._times.clear()
        self._cpu.clear()
        with _quiet():
            self._trainer.train()
        times = self._times
        tokens, supervised, positions = (int(sum(int(row[i]) for row in self._seen)) for i in range(3))
        # each loss is a sum over its batch divided by the labels of the optimizer batch
        total = sum(float(loss) * int(items if items is not None else own) for _, own, _, loss, items in self._seen)
        steps = [end - start for start, end in itertools.pairwise(times)]
        cpu = self._cpu[-1] - self._cpu[0]
        return Pass(times[-1] - times[0], tokens, supervised, total / supervised, positions, steps, cpu)

    def evaluate(self) -> float:
        """Returns the seconds of one evaluation on the pool."""
        started = time.perf_counter()
        with _quiet():
            self._trainer.evaluate(self._trainer.train_dataset)
        synchronize(self._device)
        return time.perf_counter() - started


def _watching(peer: TrlPeer) -> tuple[Any, Any]:
    """Returns an SFTTrainer class and a callback that tell a peer of each batch and of the ends of steps."""
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Watched(SFTTrainer):  # type: ignore[misc]
        """Tells of each batch."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Computes the loss as SFTTrainer does."""
            labels, mask = inputs["labels"], inputs.get("attention_mask")
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            # `num_items_in_batch` divides by the whole optimizer batch: the parts of it add up
            peer.saw(labels, mask, loss, kwargs.get("num_items_in_batch"))
            return loss

    class Clock(TrainerCallback):
        """Tells when steps end."""

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            """The first batch is fetched after this."""
            peer.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """The optimizer step is done."""
            peer.tick()

    return Watched, Clock()


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps TRL's and datasets' bars and printed metrics out of the rows."""
    import datasets

    datasets.disable_progress_bars()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
