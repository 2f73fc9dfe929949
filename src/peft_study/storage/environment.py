"""Code state, versions and hardware of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

_PACKAGES = ("peft-study", "torch", "transformers", "peft", "tokenizers", "numpy", "safetensors", "optuna", "ray")


def environment() -> dict[str, object]:
    """Returns versions, hardware, threads, and the code's commit where it lies in a git checkout."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "code": _code_state(),
    }


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory so far, in bytes: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resident("VmHWM")
    if peak is not None:
        return peak
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024  # macOS counts bytes


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Returns the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _code_state() -> dict[str, object] | None:
    """Returns commit and whether files differ from it, or None where the package is not in a git checkout."""
    folder = Path(__file__).parent
    try:
        # a virtual environment often lies inside a repository of its user's
        known = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(known, cwd=folder, capture_output=True, timeout=10, check=True)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed)}


def resident(name: str) -> int | None:
    """Returns the memory of this process in bytes: VmRSS (now) or VmHWM (peak); None on systems without /proc.

    In a child process, getrusage's peak is at least its parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
