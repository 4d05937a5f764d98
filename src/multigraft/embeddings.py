"""The base's embedding matrices in an adapter's file, for vocabularies that were resized.

New rows of an embedding are no part of the base model that others have, so an adapter that was
trained with them is worth nothing without them. They are saved with it (`save_embedding_layers`),
and loaded as its own copies, so that neither the base nor other adapters change.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import PeftConfig
from multigraft.errors import CheckpointError, ConfigError, MultigraftError, MultigraftWarning
from multigraft.reading import read_config
from multigraft.roster import Roster
from multigraft.storage import slot_of
from multigraft.survey import Spot, survey


def embedding_tensors(
    roster: Roster,
    adapter: str,
    choice: str | bool,
    gathered: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The base's embedding matrices that go with an adapter, by key relative to the base model.

    Args:
        gathered: a state dict of the base model to take the values from (sharded training).
        choice: True for those that the adapter adapts, or all when it adapts none; ``"auto"`` for
            all when the vocabulary was resized; False for none.

    Raises:
        ConfigError: ``choice`` is none of these.
    """
    if choice not in (True, False, "auto"):
        raise ConfigError(f'`save_embedding_layers` (={choice!r}) must be True, False or "auto".')
    is_resized = choice == "auto" and was_resized(roster.root, roster.configs[adapter])
    if choice is not True and not is_resized:
        return {}
    if is_resized:
        warnings.warn(
            f"the vocabulary was resized since the base model was loaded: its embeddings are saved "
            f"with adapter `{adapter}` (`save_embedding_layers`).",
            MultigraftWarning,
            stacklevel=5,
        )
    found = dict(_embeddings(roster, adapter, gathered or {}))
    adapted = {key: value for key, value in found.items() if ".base_layer." in key}
    if not found:
        warnings.warn(
            "`save_embedding_layers` (=True): this model has no embedding that is known as such. "
            "Name it in `modules_to_save`.",
            MultigraftWarning,
            stacklevel=5,
        )
    return adapted if adapted and not is_resized else found


def take_embeddings(
    config: PeftConfig, tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """The file's tensors, with its embedding matrices made the adapter's own, or left out.

    Left out are those that are the base's own. Of an embedding that the adapter adapts, only the
    rows that differ are taken (`trainable_token_indices`); of others the whole matrix is
    (`modules_to_save`).

    Raises:
        CheckpointError: a matrix has more or fewer rows than the model's.
    """
    kept = _with_rows(config, dict(tensors), model)
    saved = getattr(config, "modules_to_save", None) or []
    taken = []
    for spot in _spots(model):
        key = f"{spot.path}.weight"
        if key not in kept or any(f".{p}".endswith(f".{n}") for p in spot.paths for n in saved):
            continue
        own, value = _weight(spot), kept[key]
        if own.shape != value.shape:
            _refuse_rows(key, own, value)
        if torch.equal(own.to(value.dtype).cpu(), value.cpu()):
            del kept[key]
        elif hasattr(config, "modules_to_save"):
            taken.append(spot.path)
    if taken:
        config.modules_to_save = [*saved, *taken]  # type: ignore[attr-defined]
        warnings.warn(
            f"the file brings the matrices of {', '.join(taken)}, which are not this model's: the "
            "adapter has copies of its own (`modules_to_save`), and the base stays as it is.",
            MultigraftWarning,
            stacklevel=4,
        )
    return kept


def _with_rows(config: PeftConfig, kept: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rows in the place of adapted embeddings' matrices, where some of these are not the base's."""
    if getattr(config, "trainable_token_indices", ()) is not None:
        return kept
    chosen: dict[str, list[int]] = {}
    shared: set[int] = set()
    for spot in _spots(model):
        key, held = f"{spot.path}.base_layer.weight", id(spot.layer._parameters.get("weight"))
        if key not in kept:
            continue
        own, value = _weight(spot), kept[key]
        if own.shape != value.shape:
            _refuse_rows(key, own, value)
        rows = (own.to(value.dtype).cpu() != value.cpu()).any(1).nonzero().flatten()
        if not len(rows) or 2 * len(rows) > len(own):
            continue  # the base's own, or another base: that is for the load report to say
        del kept[key]
        if held not in shared:
            chosen[spot.path] = rows.tolist()
            kept[f"{spot.path}.token_adapter.trainable_tokens_delta"] = value[rows]
        shared.add(held)
    if chosen:
        config.trainable_token_indices = chosen  # type: ignore[attr-defined]
        names = ", ".join(f"{len(rows)} of {path}" for path, rows in chosen.items())
        warnings.warn(
            f"the file brings rows of embeddings that are not this model's ({names}): the adapter "
            "has them for its own (`trainable_token_indices`), and the base stays as it is.",
            MultigraftWarning,
            stacklevel=5,
        )
    return kept


def _refuse_rows(key: str, own: Tensor, value: Tensor) -> None:
    tokens = value.shape[0] if value.dim() else 0  # a file may hold anything
    raise CheckpointError(
        f"{key}: the adapter was trained with {tokens} tokens and the model has {len(own)}. Call "
        f"model.resize_token_embeddings({tokens}) before loading it."
    )


def was_resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the model has another number of tokens than the files that it was loaded from."""
    now = _vocabulary(getattr(model, "config", None))
    name = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    then = _saved_vocabulary(name) if name and now else None
    return then is not None and then != now


def _embeddings(
    roster: Roster, adapter: str, gathered: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    grafts = [g for _, g in roster.grafts(adapter) if not g.site.parameter]
    own = {id(g.site.layer): g for g in sorted(grafts, key=lambda g: not g.method.rides)}
    spots = {id(s): s for s in _spots(roster.root)}
    spots |= {
        id(s): s
        for s in survey(roster.root)
        if isinstance(s.layer, nn.Embedding) and id(s.layer) in own
    }
    for spot in spots.values():
        graft = own.get(id(spot.layer))
        if graft is not None and graft.method.kind == "replace":
            continue  # its copy is what the file has
        is_wrapped = graft is not None and not graft.method.rides  # by PEFT, in a layer of its own
        live = f"{spot.path}.{'base_layer.' * (spot.wrapper is not None)}weight"
        value = gathered[live] if live in gathered else _weight(spot)
        yield f"{spot.path}.{'base_layer.' * is_wrapped}weight", value


def _spots(model: nn.Module) -> list[Spot]:
    """The model's input and output embeddings, as transformers tells them."""
    asked = (getattr(model, f"get_{which}_embeddings", None) for which in ("input", "output"))
    modules = [ask() for ask in asked if callable(ask)]
    layers = {id(getattr(m, "base_layer", m)) for m in modules if m is not None}
    return [spot for spot in survey(model) if id(spot.layer) in layers]


def _weight(spot: Spot) -> Tensor:
    """The base's own matrix, even while adapters are merged into it."""
    slot = slot_of(spot.layer)
    kept = spot.wrapper.kept if spot.wrapper is not None else {}
    return slot.read_kept(kept["weight"]) if "weight" in kept else slot.read()


def _vocabulary(config: Any) -> int | None:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "vocab_size", None)
    return found if isinstance(found, int) else None


def _saved_vocabulary(name: str) -> int | None:
    """As the config of a local folder says, or of the hub's cache; nothing is fetched."""
    path: Any = Path(name) / "config.json"
    if not path.is_file():
        try:
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(name, "config.json")
        except Exception:  # not installed, or no name that a repository could have
            return None
    try:
        values = read_config(Path(path))
        found = values.get("vocab_size", (values.get("text_config") or {}).get("vocab_size"))
    except (MultigraftError, TypeError, AttributeError):
        return None
    return found if isinstance(found, int) else None
