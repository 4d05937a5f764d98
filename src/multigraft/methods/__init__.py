"""Methods: one file each. The import list is explicit and sorted."""

from multigraft.methods import bias, lora, saved_module, vera
from multigraft.methods.contract import METHODS, Method, TensorSpec, method

__all__ = ["METHODS", "Method", "TensorSpec", "bias", "lora", "method", "saved_module", "vera"]
