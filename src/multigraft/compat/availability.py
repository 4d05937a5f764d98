"""PEFT's `peft.import_utils`: which optional packages are there. None is imported to find out."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def _is_there(*names: str) -> bool:
    return any(find_spec(name) is not None for name in names)


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _is_there("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed; every version that works here has 4-bit layers."""
    return is_bnb_available()


def is_gptqmodel_available() -> bool:
    """Whether GPTQModel is installed."""
    return _is_there("gptqmodel")


def is_optimum_available() -> bool:
    """Whether Optimum is installed."""
    return _is_there("optimum")


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether PyTorch/XLA is installed, and a device of it answers if that is asked."""
    if not _is_there("torch_xla"):
        return False
    if not check_device:
        return True
    try:
        # For TPUs alone, and not among what development installs.
        import torch_xla.core.xla_model as xla  # type: ignore[import-not-found]

        xla.xla_device()
    except (ImportError, RuntimeError):
        return False
    return True


def is_aqlm_available() -> bool:
    """Whether AQLM is installed."""
    return _is_there("aqlm")


def is_eetq_available() -> bool:
    """Whether EETQ is installed."""
    return _is_there("eetq")


def is_hqq_available() -> bool:
    """Whether HQQ is installed."""
    return _is_there("hqq")


def is_inc_available() -> bool:
    """Whether Intel's Neural Compressor is installed."""
    return _is_there("neural_compressor")


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return _is_there("torchao")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether there is an Intel GPU that can be used."""
    xpu = getattr(torch, "xpu", None)
    return xpu is not None and bool(xpu.is_available())


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _is_there("diffusers")


def is_te_available() -> bool:
    """Whether Transformer Engine is installed."""
    return _is_there("transformer_engine")


def is_te_pytorch_available() -> bool:
    """The same: its part for PyTorch comes with it."""
    return is_te_available()
