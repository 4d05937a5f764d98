"""A LoRA out of a fully fine-tuned model and its base, layer by layer.

    B A ≈ W_tuned - W_base        Δb = b_tuned - b_base, exactly, as `lora_bias`

One layer's difference is in memory at a time: a tuned model can lie on another device, or in a
file that is read tensor by tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft import checkpoint
from multigraft.combine import svd
from multigraft.combine.assembled import assembled, free_name
from multigraft.combine.contract import Options
from multigraft.combine.ranks import Rank, Residual, check_rank
from multigraft.combine.sites import rank_each, rank_of
from multigraft.combine.svd import Cut
from multigraft.combine.tuned import Tuned
from multigraft.errors import MergeError, StateError, UnsupportedError
from multigraft.keys import disk_names, full_key
from multigraft.methods.lora import LoraConfig
from multigraft.prepare import Prepared
from multigraft.site import Site
from multigraft.survey import survey
from multigraft.tuner import Tuner, base_of

WHERE = "extract_lora"


@dataclass(frozen=True)
class Extraction:
    """A LoRA, and what of the fine-tuning is not in it.

    Args:
        config: of scaling 1.
        state_dict: tensors by their names in PEFT's files.
        residuals: layer by layer, in the model's order.
        left_out: names of the base's tensors that the fine-tuning changed and the LoRA does not.
        error: ‖ΔW - B A‖ / ‖ΔW‖ over all its layers together.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor] = field(repr=False)
    residuals: list[Residual]
    left_out: list[str]
    error: float

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the adapter's files into a directory, in PEFT's format, all or nothing."""
        root = Path(save_directory)
        checkpoint.save(root, {root: (self.config, self.state_dict)})


@torch.no_grad()
def extract_lora(
    base: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    rank: Rank,
    config: LoraConfig | None = None,
    *,
    device: torch.device | str | None = None,
) -> Extraction:
    """The LoRA that comes nearest to turning ``base`` into ``tuned``; both stay as they are.

    Args:
        base: the base model; a handle stands for its base.
        tuned: the same architecture fine-tuned: a model, its tensors by name, or a directory (or
            file) of safetensors, which is read tensor by tensor.
        rank: of each layer, at most; or a float: the share of the energy, the sum of squared
            singular values, that is kept at each layer.
        config: what to target, "all-linear" by default, and `modules_to_save`, which are taken over
            whole. Layers that did not change are left out.
        device: where to decompose; where the base's layer is, by default.

    Raises:
        ConfigError: the rank is out of range.
        TargetError: the config does not fit the base.
        CheckpointError: a tensor is missing from ``tuned`` or has another shape.
        StateError: no targeted layer changed.
        MergeError: ``tuned`` holds NaN or infinity.
    """
    check_rank(WHERE, "rank", rank)
    model = base_of(base)
    tuner = Tuner(model)
    wanted: Any = LoraConfig(target_modules="all-linear") if config is None else config.copy()
    wanted.lora_bias = wanted.use_dora = False
    prepared = tuner.prepare(free_name(tuner), wanted)
    values = Tuned(tuned)
    cuts, norms = _cuts(prepared, values, rank, device)
    if not cuts:
        raise StateError(
            f"{WHERE}: `tuned` differs from the base at none of the "
            f"{len(prepared.main_sites)} targeted layers. Is it the fine-tuned model?"
        )
    biases = _biases(prepared, cuts, values)
    copies = _copies(prepared, values)
    dtype = reduce(torch.promote_types, (cut.a.dtype for cut in cuts.values()))
    made, state = assembled(tuner, prepared.config, cuts, biases, copies, dtype)
    lost = sum((cut.error * norm) ** 2 for cut, norm in zip(cuts.values(), norms, strict=True))
    return Extraction(
        config=made,
        state_dict={full_key(key): value for key, value in state.items()},
        residuals=[Residual(str(s), rank_of(s, c.a), c.error) for s, c in cuts.items()],
        left_out=list(_left_out(model, values, _covered(prepared, cuts, biases))),
        error=math.sqrt(lost / sum(norm**2 for norm in norms)),
    )


def _cuts(
    prepared: Prepared, tuned: Tuned, rank: Rank, device: torch.device | str | None
) -> tuple[dict[Site, Cut], list[float]]:
    """The pair of each targeted site that changed, and the norm of what it approximates."""
    cuts, norms = {}, []
    for site in prepared.main_sites:
        if site.tied is not None:
            continue
        geometry = site.geometry
        assert geometry is not None
        own = site.weight()
        where = own.device if device is None else torch.device(device)
        dtype = torch.promote_types(own.dtype, torch.float32)
        wide = partial(torch.Tensor.to, device=where, dtype=dtype)
        change = wide(tuned.get(_name(site), own.shape)) - wide(own)
        norm = float(change.norm())
        if not math.isfinite(norm):
            raise MergeError(f"{WHERE}: {_name(site)} of `tuned` holds NaN or infinity.")
        if norm == 0:
            continue
        if getattr(site.layer, "groups", 1) > 1:
            raise UnsupportedError(
                f"{WHERE}: {site} is a convolution with `groups` > 1, where LoRA's pair reaches "
                "weights that the layer does not have. Leave it out of `target_modules`."
            )
        M = geometry.as_matrices(site.layer, change / site.times)
        cut = svd.of_matrix(M, rank_each(site, len(M), rank), Options())
        cuts[site] = cut._replace(a=cut.a.to(own.device), b=cut.b.to(own.device))
        norms.append(norm)
    return cuts, norms


def _biases(prepared: Prepared, cuts: Mapping[Site, Cut], tuned: Tuned) -> dict[Site, Tensor]:
    """Δb of the adapted layers that the config does not copy; empty where it cannot have them."""
    copied = {_name(need.site) for need, method in prepared.parts if method.name == "BIAS"}
    if any(site.geometry is not None and site.geometry.name == "embedding" for site in cuts):
        return {}
    found = {}
    for site in cuts:
        bias = getattr(site.layer, "bias", None)
        is_free = site.parameter is None and _name(site, "bias") not in copied
        if is_free and isinstance(bias, Tensor):
            wide = torch.promote_types(bias.dtype, torch.float32)
            change = tuned.get(_name(site, "bias"), bias.shape).to(bias.device, wide) - bias.to(
                wide
            )
            if change.any():
                found[site] = change / site.times
    # Where the layer does not run, B's bias can only be added to the layer's own.
    needs_own = [s for s in cuts if s.rebinds and getattr(s.layer, "bias", None) is None]
    return {} if needs_own else found


def _copies(prepared: Prepared, tuned: Tuned) -> dict[str, Tensor]:
    """What the config takes over whole, by key on disk."""
    copies = {}
    for need, method in prepared.parts:
        if not need.method.rides or need.site.tied is not None:
            continue
        for name, spec in method.tensors().items():
            if method.kind == "replace":
                source = f"{need.site.path}.{name}"
            elif method.name == "BIAS":
                source = _name(need.site)
            else:
                raise UnsupportedError(
                    f"{WHERE}: `trainable_token_indices` cannot be extracted. Target the embedding "
                    "itself, or save it whole with `modules_to_save`."
                )
            key = disk_names(need.site, spec.on_disk or name, prepared.config)
            copies[key] = tuned.get(source, torch.Size(spec.shape)).clone()
    return copies


def _covered(
    prepared: Prepared, cuts: Mapping[Site, Cut], biases: Mapping[Site, Tensor]
) -> set[str]:
    """Names of the base's tensors that the extraction accounts for."""
    names = {_name(site) for site in cuts} | {_name(site, "bias") for site in biases}
    for need, method in prepared.parts:
        if method.kind == "replace":
            names |= {f"{need.site.path}.{name}" for name in method.tensors()}
        elif need.method.rides:
            names.add(_name(need.site))
    return names


def _left_out(base: nn.Module, tuned: Tuned, covered: set[str]) -> Iterator[str]:
    """Names of tensors that differ and are in nothing that was extracted."""
    for name, own in _tensors(base):
        if name not in covered:
            other = tuned.find(name)
            same = other is None or (
                other.shape == own.shape and torch.equal(other.to(own), own.detach())
            )
            if not same:
                yield name


def _tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's own parameters and buffers that its state has, by base path."""
    spots = ((spot.path, spot.layer) for spot in survey(base))
    for path, module in (("", base), *spots):
        held = {**module._parameters, **module._buffers}
        for name, value in held.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, value


def _name(site: Site, tensor: str | None = None) -> str:
    """Name of a base tensor in the base model's state."""
    return f"{site.host_path}.{site.key_of(tensor or site.tensor_name)}"
