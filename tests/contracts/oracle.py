"""The same pair adapted by PEFT, for the agreement laws and for the table of what each supports.

theirs = adapt(pair, "a")        # PEFT's model, the adapter's values taken from ours
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch

import multigraft
from multigraft import PeftModel
from tests.contracts.at_work import (
    assert_near,
    attach,
    batch,
    exact,
    is_plain,
    mergeable,
    tolerance,
)
from tests.contracts.pairs import INVOKED, STORAGES, TARGET, Pair, Subject
from tests.oracle import quiet

FLAGS = {"bnb-nf4": "4bit", "bnb-fp4": "4bit", "bnb-int8": "8bit"}
"""What transformers would have set on the model, and PEFT looks at instead of the layer."""


def flagged(pair: Pair) -> Subject:
    """The pair's model, with the flag without which PEFT takes a 4-bit layer for a plain one."""
    subject = exact(pair, pair.subject())
    for storage, bits in FLAGS.items():
        if pair.storage.startswith(storage):
            setattr(subject, f"is_loaded_in_{bits}", True)
    return subject


def peft_model(pair: Pair) -> Any:
    """PEFT's model of this pair with its adapter `a`, as initialised by PEFT."""
    subject = flagged(pair)
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(pair.peft_type)](**pair.kwargs())
    autocast = not is_plain(pair)
    return told(pair, peft.get_peft_model(subject, config, "a", autocast_adapter_dtype=autocast))


def told(pair: Pair, model: Any) -> Any:
    """PEFT's model, told where each row is invoked: it looks for that in language models alone."""
    if pair.invocation:
        length = pair.input().shape[1]
        offsets = [None if start is None else length - start for start in INVOKED]
        model.forward = functools.partial(model.forward, alora_offsets=offsets)
    return model


@dataclass(frozen=True)
class Support:
    """What PEFT does with a pair without an exception."""

    adapts: bool
    merges: bool


@functools.lru_cache(None)
def support(pair: Pair) -> Support:
    """Tried, not looked up: attach, train, merge, and see whether the output stays."""
    x = batch(pair)
    with quiet():
        try:
            model = peft_model(pair)
            settle(pair, model)
            model(x).float().square().sum().backward()
            if not any(p.grad is not None and is_own(pair, n) for n, p in model.named_parameters()):
                return Support(False, False)
            with torch.no_grad():
                move(model)
                expected = model(x)
        except Exception:
            return Support(False, False)
        try:
            with torch.no_grad():
                model.merge_adapter()
                allowed = 4 * tolerance(pair) + 2 * STORAGES[pair.storage].error
                assert_near(model(x), expected, allowed)
        except Exception:
            return Support(True, False)
    return Support(True, True)


def is_own(pair: Pair, parameter: str) -> bool:
    """Whether a parameter is the method's, and not that of another whose config it rides on."""
    return pair.method == pair.peft_type or "lora_" not in parameter


def move(model: torch.nn.Module) -> None:
    """Change every trainable value, so that merging has something to do."""
    source = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            noise = torch.randn(parameter.shape, generator=source)
            parameter.add_(0.1 * noise.to(parameter.dtype))


def both(pair: Pair) -> tuple[PeftModel, Any]:
    """(ours, theirs) with the same values."""
    ours = attach(pair)
    with quiet():
        theirs = peft_model(pair).eval()
        state = multigraft.get_peft_model_state_dict(ours, adapter_name="a")
        peft.set_peft_model_state_dict(theirs, state, "a")
    return ours, theirs


@dataclass(frozen=True)
class Agreement:
    """One law of agreement, and whether it says anything about a pair that PEFT supports."""

    check: Callable[[Pair], None]
    applies: Callable[[Pair], bool]

    def __call__(self, pair: Pair) -> None:
        self.check(pair)

    def __str__(self) -> str:
        return self.check.__name__


AGREEMENTS: list[Agreement] = []


def agreement(applies: Callable[[Pair], bool] = lambda pair: True) -> Callable[..., None]:
    """Decorator: put a law on the list."""

    def add(check: Callable[[Pair], None]) -> None:
        AGREEMENTS.append(Agreement(check, applies))

    return add


def settle(pair: Pair, *models: torch.nn.Module) -> None:
    """In evaluation bitsandbytes packs its weights, and PEFT misreads what is packed."""
    for model in models:
        model.train(pair.storage.startswith("bnb"))


@agreement()
@torch.no_grad()
def outputs_agree(pair: Pair) -> None:
    ours, theirs = both(pair)
    x = batch(pair)
    settle(pair, ours, theirs)
    assert_near(ours(x), theirs(x), 2 * tolerance(pair))


@agreement(is_plain)
def gradients_agree(pair: Pair) -> None:
    ours, theirs = both(pair)
    x = batch(pair)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    mine = {of_peft(n): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    other = {in_ours(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    other.pop(f"base_model.model.{TARGET}.ranknum.a", None)  # a rank, thawed by loading a state
    assert mine.keys() == other.keys()
    for name, grad in mine.items():
        assert_near(grad, other[name], 10 * tolerance(pair))


def in_ours(name: str) -> str:
    """PEFT's trained tokens beside another method hang one module deeper."""
    return name.replace(".token_adapter.", ".")


def of_peft(name: str) -> str:
    """PEFT trains the base's own bias where each of our adapters has a copy."""
    return re.sub(r"bias_copy_bias\.a$", "base_layer.bias", name)


@agreement(lambda pair: is_plain(pair) and mergeable(pair) and support(pair).merges)
@torch.no_grad()
def merged_layers_agree(pair: Pair) -> None:
    ours, theirs = both(pair)
    with quiet():
        mine, other = ours.merge_and_unload(), theirs.merge_and_unload()
    for name, tensor in mine.get_submodule(TARGET).state_dict().items():
        assert_near(tensor, other.get_submodule(TARGET).state_dict()[name], 10 * tolerance(pair))


@agreement()
@torch.no_grad()
def files_of_either_load_in_the_other(pair: Pair) -> None:
    ours, theirs = both(pair)
    x = batch(pair)
    options = {"autocast_adapter_dtype": not is_plain(pair)}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(f"{folder}/ours")
        theirs.save_pretrained(f"{folder}/theirs")
        read = peft.PeftModel.from_pretrained(flagged(pair), f"{folder}/ours/a", "a", **options)
        read = told(pair, read)
        mine = PeftModel.from_pretrained(flagged(pair), f"{folder}/theirs/a", "a", **options)
    settle(pair, theirs, read)
    assert_near(read(x), theirs(x), tolerance(pair))
    one, two = (multigraft.get_peft_model_state_dict(m, adapter_name="a") for m in (ours, mine))
    assert one.keys() == two.keys()
    for key, value in one.items():
        # A bias is trained in the base there, and so in the base's dtype.
        assert_near(two[key], value, pair.rounding if key.endswith("bias") else 0.0)


DEFECTS: dict[str, str] = {
    r"outputs_agree-LORA.init_lora_weights=olora.*-bnb-": (
        "PEFT quantises anew what OLoRA leaves of the base, and so changes the base"
    ),
    r"outputs_agree-LORA.init_lora_weights=(olora|pissa).*-(weight|spectral)-norm(-hook)?$": (
        "PEFT takes its part out of a computed weight, which the next forward computes again"
    ),
    r"outputs_agree-LORA.init_lora_weights=(olora|pissa).*-linear-orthogonal$": (
        "PEFT takes its part out of a computed weight, which the next forward computes again"
    ),
    r"outputs_agree-LORA.kasa_config.*-(weight|spectral)-norm(-hook)?$": (
        "PEFT takes its part out of a computed weight, which the next forward computes again"
    ),
    r"outputs_agree-LORA.kasa_config.*-linear-orthogonal$": (
        "PEFT takes its part out of a computed weight, which the next forward computes again"
    ),
    r"agree-LORA.kasa_config.*-linear-float(32|64)$": "PEFT decomposes float64 weights in float32",
    r"-LORA.(kasa|monteclora)_config.*-bnb-": (
        "PEFT passes KaSA and MonteCLoRA over in silence on quantised layers"
    ),
    r"-LORA.use_bdlora.*-bnb-": "PEFT passes `use_bdlora` over in silence on quantised layers",
    r"-LORA.use_qalora": "PEFT passes `use_qalora` over in silence, except on GPTQ's layers",
    r"(outputs|gradients)_agree-(TRAINABLE_TOKENS|TOKEN_ADAPTER).*-linear-": (
        "PEFT drops the bias of a linear layer whose rows are trained tokens"
    ),
    r"gradients_agree-LOHA.*effective_conv2d=True.*-conv[12]d-": (
        "PEFT's hand-written backward of LoHa's factored kernels is not the gradient of its forward"
    ),
    r"gradients_agree-(LORA|BIAS).*-attention-": (
        "PEFT adds the update of an attention's `out_proj` twice and differentiates it once"
    ),
    r"(files_of_either|agree).*-LN_TUNING.*-attention-": (
        "PEFT writes the adapter's name into the keys of a copy with layers inside, and loads none"
    ),
    r"files_of_either.*-LN_TUNING.*-(weight-norm|spectral-norm|orthogonal)$": (
        "PEFT writes the adapter's name into the keys of a parametrised copy"
    ),
    r"outputs_agree-LN_TUNING.*-(weight-norm|spectral-norm|orthogonal)$": (
        "PEFT does not load the keys of a parametrised copy"
    ),
}
"""Where PEFT contradicts itself: an expression over the test's name, and why."""


def defect(law: Agreement, pair: Pair) -> str | None:
    """PEFT's known defect in this very comparison, if any."""
    name = f"{law}-{pair}"
    return next((why for pattern, why in DEFECTS.items() if re.search(pattern, name)), None)
