"""Names of tensors in adapter files: how PEFT's files have them, and how others do.

    base_model.model.<path>.<group>[.<leaf>]         the group is lora_A, ia3_l, oft_R, …

In memory, and in files of older PEFT, the adapter's name stands behind the group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from multigraft.keys import INFIXES, PREFIX, full_key
from multigraft.methods import METHODS

LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
HELD = ("base_layer", "original_module")
LEAVES = ("weight", "bias")
_PREFIXES = tuple(m.prefix for _, m in METHODS.items() if m.prefix.endswith("_"))
_WHOLE = ("ln_tuning_layers", "modules_to_save")


@dataclass(frozen=True)
class Parsed:
    """A tensor's name, taken apart.

    Args:
        site: the base path, which may still end in a wrapper's words where adapters are nested.
        group: what the adapter calls the tensor; empty for a tensor of a whole module.
        adapter: the adapter's name, where it stands there.
        rest: what follows: usually a leaf, or the way into a nest.
    """

    site: str
    group: str
    adapter: str
    rest: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name without the adapter's, relative to the base model."""
        if self.group == "modules_to_save":  # a trained copy has the module's own name
            return ".".join(part for part in (self.site, *self.rest) if part)
        rest = () if self.group == "lora_magnitude_vector" else self.rest
        return ".".join(part for part in (self.site, self.group, *rest) if part)


def is_group(part: str) -> bool:
    """Whether a component of a name is an adapter's, rather than a module's."""
    return part in _WHOLE or part.startswith(_PREFIXES)


@lru_cache(1 << 17)
def parsed(name: str) -> Parsed:
    """Take a name apart; prefixes and torch's wrappers are left away."""
    parts = _base_parts(name)
    index = next((i for i, part in enumerate(parts) if is_group(part)), None)
    if index is None:
        return Parsed(".".join(parts), "", "", ())
    site, group, rest = ".".join(parts[:index]), parts[index], parts[index + 1 :]
    adapter = ""
    if rest and rest[0] not in (*LEAVES, *HELD) and not is_group(rest[0]):
        adapter, rest = rest[0], rest[1:]
    return Parsed(site, group, adapter, tuple(rest))


def nested(name: str, by_design: bool = False) -> bool:
    """Whether a tensor's name tells of an adapter inside another one's wrapper.

    Args:
        by_design: whether wrappers of base layers in base layers belong to one adapter, as PEFT
            writes several adapted parameters of one module.
    """
    found = parsed(name)
    inside = any(part in HELD or is_group(part) for part in found.rest)
    held = found.site.rpartition(".")[2]
    return bool(found.group) and (inside or (held in HELD and not by_design))


def standards(names: Iterable[str]) -> dict[str, str]:
    """These names of one file to those that PEFT's files have; nested ones stay as they are."""
    names = list(names)
    is_adalora = any(parsed(name).group == "lora_E" for name in names)  # its pairs are no modules
    found = {n: n if nested(n) else _standard(n, are_modules=not is_adalora) for n in names}
    # PEFT writes biases of trained copies twice (`bias="all"`): the second one is no other layout.
    return {old: old if is_copy(old) and new in found else new for old, new in found.items()}


def is_copy(name: str) -> bool:
    """Whether a name is of a trained copy, without the adapter's name."""
    found = parsed(name)
    return found.group == "modules_to_save" and not found.adapter


def _standard(name: str, are_modules: bool) -> str:
    if not name.startswith("base_model.") and "." not in name:
        return name  # of an adapter as a whole, such as a prompt
    found = parsed(name)
    if found.site.startswith("base_model."):
        return name  # beside the base, as prompt learning saves modules
    is_pair = found.group in ("lora_A", "lora_B")
    if is_pair and are_modules and not found.rest:  # loralib's names
        return full_key(f"{found.key}.weight")
    return full_key(found.key)


def _base_parts(name: str) -> list[str]:
    parts = [part for part in name.split(".") if part not in INFIXES]
    if parts[:1] == ["module"] and len(parts) > 1 and parts[1] == "base_model":
        parts = parts[1:]  # data-parallel
    prefix = PREFIX.rstrip(".").split(".")
    while parts[: len(prefix)] == prefix:
        parts = parts[len(prefix) :]
    return parts


@dataclass(frozen=True)
class Tool:
    """Another tool's way to name tensors.

    Args:
        name: whose it is.
        pattern: what such a name looks like.
        remedy: how to get files that can be loaded here.
    """

    name: str
    pattern: str
    remedy: str


TOOLS = (
    Tool(
        "kohya's scripts (sd-scripts, A1111, LyCORIS)",
        r"(lora|lycoris)_(unet|te\d?|transformer|prior\w*)_\w+\.(lora_(down|up|mid)\.weight|alpha|"
        r"hada_\w+|lokr_\w+|dora_scale|oft_\w+|diff(_b)?)",
        "Convert it: multigraft convert FILE --to peft -o DIR. If that refuses it, load it in "
        "diffusers, pipe.load_lora_weights(FILE), which maps its names to modules, and "
        "save what it made: peft.get_peft_model_state_dict(pipe.unet), with the "
        "config of pipe.unet.peft_config.",
    ),
    Tool(
        "diffusers, for several models in one file",
        r"(unet|transformer|text_encoder(_\d)?|prior)\..+\.(lora_[AB]|lora\.(down|up))\.weight",
        "Convert it: multigraft convert FILE --to peft -o DIR; or load it in diffusers, "
        "pipe.load_lora_weights(FILE), and save what it made of each "
        "model: peft.get_peft_model_state_dict(pipe.unet), with the config of "
        "pipe.unet.peft_config.",
    ),
    Tool(
        "diffusers before PEFT",
        r".+(\.processor)?\.(to_\w+_lora|lora|lora_linear_layer)\.(down|up)\.weight",
        "Convert it: multigraft convert FILE --to peft -o DIR; or load it in diffusers, "
        "pipe.load_lora_weights(FILE), and save what it made: "
        "peft.get_peft_model_state_dict(pipe.unet), with the config of pipe.unet.peft_config.",
    ),
    Tool(
        "AdapterHub",
        r".+\.loras\.[^.]+\.lora_[AB]",
        "Export the adapter there: merge it (model.merge_adapter(NAME)), or rewrite "
        "`loras.NAME.lora_A` as `lora_A.weight` below base_model.model.",
    ),
    Tool(
        "MLX",
        r".+\.lora_[ab]",
        "Transpose each `lora_a` (in, rank) to `lora_A.weight` (rank, in) and each `lora_b` "
        "(rank, out) to `lora_B.weight` (out, rank), below base_model.model.",
    ),
    Tool(
        "torchtune",
        r".+\.lora_[ab]\.weight|.+\.magnitude",
        "Let torchtune save the adapter in PEFT's format: its checkpointer writes "
        "adapter_model.safetensors and adapter_config.json with save_adapter_weights_only=True.",
    ),
    Tool(
        "NeMo",
        r".+\.adapter_layer\..+\.linear_(in|out)\.weight",
        "Export it in NeMo with export_ckpt(target='hf-peft').",
    ),
)
"""What is recognised, the more special pattern first."""
LOOKED_AT, LONGEST = 10_000, 200
"""How many names, of at most so many characters; no other tool's file has more."""


def tools_of(names: Iterable[str]) -> dict[str, Tool]:
    """Names that other tools gave to tensors, and which; of the first `LOOKED_AT` names."""
    found = {}
    for name in islice(names, LOOKED_AT):
        short = name if len(name) <= LONGEST else ""
        tool = next((tool for tool in TOOLS if re.fullmatch(tool.pattern, short)), None)
        if tool is not None:
            found[name] = tool
    return found
