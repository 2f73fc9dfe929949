"""The rules, a file a subject. Every module of this folder is loaded: a new rule is a function in one file."""

from __future__ import annotations

import importlib
import pkgutil

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
