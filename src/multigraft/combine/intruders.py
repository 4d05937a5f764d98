"""Intruder dimensions: directions of the adapted weight that the base's own does not have.

    W + ΔW = U S Vᵀ        u_i intrudes when max_j |⟨u_i, u_j of W⟩| < ε, for the first k of them
    ΔW' = ΔW + (λ - 1) Σ_{i intrudes} s_i u_i v_iᵀ        cut to the adapter's rank

Paper: Shuttleworth et al. 2024, arXiv:2410.21228, definition of section 3 and the scaling of 5.
Departs: what is subtracted is a low-rank pair beside ΔW's own, so the new factors come from both
(QR, then a small SVD) and not from a dense matrix; in the layer's geometry, where PEFT's serves
linear layers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from multigraft.combine import svd
from multigraft.combine.contract import Options
from multigraft.combine.sites import padded, rank_each
from multigraft.combine.svd import Cut
from multigraft.errors import ConfigError, UnsupportedError
from multigraft.graft import Graft
from multigraft.keys import disk_names
from multigraft.merge import check_values
from multigraft.tuner import Tuner

WHERE = "reduce_intruder_dimension"
Sink = Callable[[str], object]


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Sink | None = print,
) -> None:
    """Graft a copy of a LoRA with its intruders scaled down, and make it the active adapter.

    It forgets less of what the base knew, at some cost of the task it was trained for.

    Args:
        top_k: how many of the adapted weight's first directions are looked at.
        threshold_epsilon: a direction whose largest cosine with the base's is below it intrudes.
        mitigation_lambda: what is left of an intruder, from 0 (nothing) to 1 (all of it).
        logging_sink: gets one line for each layer; None for silence.

    Raises:
        AdapterNameError: the new name is taken, or there is no such adapter.
        ConfigError: an argument is out of range.
        UnsupportedError: the adapter is no LoRA, or one whose effect is not its pair's.
    """
    tuner: Tuner = peft_model if isinstance(peft_model, Tuner) else peft_model.base_model
    roster = tuner.roster
    _check_arguments(top_k, threshold_epsilon, mitigation_lambda)
    roster.require_free(new_adapter_name)
    config = roster.configs[roster.require_one(old_adapter_name)]
    grafts = [graft for _, graft in roster.grafts(old_adapter_name)]
    for graft in grafts:
        _check(graft, old_adapter_name, str(config.peft_type))
    options = top_k, threshold_epsilon, mitigation_lambda
    given: dict[str, Tensor] = {}
    lines = []
    for graft in grafts:
        if graft.tied is None:
            method = graft.method
            values = {name: method.packed(name, t) for name, t in graft.params.items()}
            if not graft.method.rides:
                count, pair = _mitigated(graft, values, *options)
                values |= pair
                lines.append(f"{graft.site}: {f'Intruders: {count}' if count else 'No intruders'}")
            given |= {
                disk_names(graft.site, spec.on_disk or name, config): values[name]
                for name, spec in graft.own_specs.items()
                if spec.saved
            }
    is_wide = any(t.dtype == torch.float32 for g in grafts for t in g.params.values())
    tuner.commit(tuner.prepare(new_adapter_name, config), given, is_wide, activate=False)
    for line in [*lines, f"Enabling new adapter {new_adapter_name}"] if logging_sink else ():
        cast(Sink, logging_sink)(line)
    tuner.set_adapter(new_adapter_name)


def _mitigated(
    graft: Graft, values: dict[str, Tensor], top_k: int, epsilon: float, kept: float
) -> tuple[int, dict[str, Tensor]]:
    """How many directions intrude at a site, and the new factors, for the config's own scaling.

    Args:
        values: the adapter's tensors there, as they are saved.
    """
    site, method = graft.site, cast(Any, graft.method)
    geometry, layer = method.geometry, site.layer
    A, B = values[method.A], values[method.B]
    new = type(method)(site, method.config).scaling
    dtype = torch.promote_types(A.dtype, torch.float32)
    a, b = geometry.pairs(layer, A.to(site.device, dtype), B.to(site.device, dtype))
    W = geometry.as_matrices(layer, site.weight().to(dtype))
    u, s, vh, intrudes = _directions(W, a, b, method.scaling, top_k, epsilon)
    count = int(intrudes.sum())
    if not count:
        return 0, {} if new == method.scaling else {method.B: B * (method.scaling / new)}
    # Where one expert has fewer intruders than another, the rest of its rows count for nothing.
    loss = (kept - 1) * s * intrudes / new
    cut = svd.of_factors(
        torch.cat([a * (method.scaling / new), vh], 1),
        torch.cat([b, u * loss.unsqueeze(-2)], 2),
        rank_each(site, len(a), method.rank),
        Options(),
    )
    return count, {name: value.to(A) for name, value in padded(method, _balanced(cut)).items()}


def _directions(
    W: Tensor, a: Tensor, b: Tensor, scaling: float, top_k: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first ``k`` singular triples of W + ΔW, and which of them intrude: ``(n, k)``.

    Args:
        W: ``(n, out, in)``.
        a, b: ``(n, rank, in)`` and ``(n, out, rank)``.
    """
    own, _, _ = torch.linalg.svd(W, full_matrices=False)
    u, s, vh = torch.linalg.svd(torch.baddbmm(W, b, a, alpha=scaling), full_matrices=False)
    u, s, vh = u[..., :top_k], s[:, :top_k], vh[:, :top_k]
    return u, s, vh, (u.mT @ own).abs().amax(-1) < epsilon


def _balanced(cut: Cut) -> Cut:
    """The same products with singular values shared equally by both factors, as in PEFT."""
    roots = cut.b.norm(dim=1).sqrt()
    return cut._replace(
        a=cut.a * roots.unsqueeze(-1), b=cut.b / roots.clamp_min(1e-30).unsqueeze(-2)
    )


def _check(graft: Graft, adapter: str, kind: str) -> None:
    if kind != "LORA":
        raise UnsupportedError(
            f"{WHERE}: `{adapter}` is a {kind}; only LoRA's directions are known. Convert it with "
            "convert_to_lora() first."
        )
    lora = cast(Any, graft.method)
    if lora.name == "LORA":
        starts = getattr(lora.config, "init_lora_weights", True)
        if lora.variant is not None or lora.start.takes_out:
            what = lora.variant.name if lora.variant is not None else starts
            raise UnsupportedError(
                f"{WHERE}: `{adapter}` uses `{what}`, whose effect is not that of its pair alone. "
                "Convert it with convert_to_lora() first."
            )
        if getattr(graft.site.layer, "groups", 1) > 1:
            raise UnsupportedError(
                f"{WHERE}: {graft.site} is a convolution with `groups` > 1, whose update has no "
                "place in the weight."
            )
    check_values(graft, str(graft.site), "reducing it", "added")


def _check_arguments(top_k: int, epsilon: float, kept: float) -> None:
    shares: Sequence[tuple[str, float]] = (
        ("threshold_epsilon", epsilon),
        ("mitigation_lambda", kept),
    )
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ConfigError(f"{WHERE}: `top_k` (={top_k!r}) must be an integer of at least 1.")
    for name, value in shares:
        if not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ConfigError(f"{WHERE}: `{name}` (={value!r}) must be at least 0 and at most 1.")
