"""Where the base model runs and in which precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_study.errors import ConfigError, nearest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Placement:
    """Device and precision of the frozen base, and one line on why where the choice may surprise."""

    device: torch.device
    dtype: torch.dtype
    note: str | None = None

    @property
    def dtype_name(self) -> str:
        """The precision's name without torch's prefix."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def scales_loss(self) -> bool:
        """True where gradients are small enough to vanish: float16 needs its loss scaled up."""
        return self.dtype == torch.float16


def choose(device: str = "auto", dtype: str = "auto") -> Placement:
    """Returns device and precision.

    Args:
        device: auto, cpu, cuda or mps; auto takes cuda, then mps, then cpu.
        dtype: auto, float32, bfloat16 or float16; auto takes bfloat16 where the device computes in it, else float32.

    Raises:
        ConfigError: when the device is unknown, not there, or cannot compute in the precision, or that is unknown.
    """
    if dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"unknown precision {dtype!r}", where="--dtype", remedy=nearest(dtype, ("auto", *_DTYPES)))
    name = _device(device)
    if name == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = name == "mps" or _cpu_has_bfloat16()
    note = None
    if dtype == "float16":
        note = "float16: the loss is scaled, and steps whose gradients overflow are skipped"
    elif dtype == "auto" and not able:
        hint = "" if name == "cpu" else "; --dtype float16 halves the memory and scales the loss"
        note = f"this {name} device does not compute in bfloat16: float32 is used{hint}"
    elif dtype == "bfloat16" and not able:
        if name == "cuda":
            what = "this card does not compute in bfloat16"
            raise ConfigError(what, where="--dtype", remedy="use --dtype float16 or float32")
        note = f"this {name} device imitates bfloat16, which may be 100 times slower: float32 is faster"
    if dtype == "auto":
        dtype = "bfloat16" if able else "float32"
    return Placement(torch.device(name), _DTYPES[dtype], note)


def _device(wanted: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if wanted not in there:
        raise ConfigError(f"unknown device {wanted!r}", where="--device", remedy="use auto, cuda, mps or cpu")
    if not there[wanted]:
        remedy = "use --device auto, or install a torch for it"
        raise ConfigError(f"no {wanted} device is available", where="--device", remedy=remedy)
    return wanted


def _cpu_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
