"""The methods: one file a family, and the registry that makes an adapter of a configuration."""

from peft_study.methods.base import Adapter, Material
from peft_study.methods.registry import create

__all__ = ["Adapter", "Material", "create"]
