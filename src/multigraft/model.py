"""`PeftModel`: a base model with adapters, as scripts written for PEFT hold it.

The lifecycle lives in `multigraft.tuner`; this class adds files, mixed batches and the task
classes' small differences.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from multigraft import checkpoint
from multigraft.averaging import WrappedFacade
from multigraft.config import PeftConfig
from multigraft.defaults import save_task_heads
from multigraft.errors import CheckpointError, RoutingError
from multigraft.gradients import checkpoints_gradients, let_gradients_in
from multigraft.handle import HandleFacade
from multigraft.loading import load_into
from multigraft.prepare import own_copy
from multigraft.prompts.facade import PromptFacade
from multigraft.roster import Roster
from multigraft.routing import Entry, Route, check_names, check_present
from multigraft.saving import write_adapters
from multigraft.schedule import penalised
from multigraft.spans import spans_of_forward, spans_of_generate
from multigraft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from multigraft.storage import parameter_counts
from multigraft.tuner import Tuner, base_of


class PeftModel(PromptFacade, WrappedFacade, HandleFacade, nn.Module):
    """A base model and its adapters, side by side.

    Args:
        model: the base model; a `PeftModel` stands for its base, so adapters never nest.
        peft_config: the first adapter's config, or None to attach none yet.
        adapter_name: its name.
        autocast_adapter_dtype: keep float32 adapters on a half-precision base.
        low_cpu_mem_usage: make the adapter's tensors on the meta device.
    """

    default_saved_modules: tuple[str, ...] = ()
    """Heads that a task's adapters train whole, where the model has them."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        base = base_of(model)
        self.base_model: Tuner = Tuner(base)
        self.config: Any = getattr(base, "config", {"model_type": "custom"})
        self.training = base.training
        if not self.roster.configs:
            self.roster.in_place = False
        if peft_config is not None:
            self.base_model.add_adapter(
                adapter_name,
                self._with_defaults(peft_config),
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                activate=True,
            )
        self.roster.show_contexts(self)
        if checkpoints_gradients(base):
            let_gradients_in(base)

    # -- what it holds ------------------------------------------------------------------------

    @property
    def roster(self) -> Roster:
        """Which adapters there are and who is active."""
        return self.base_model.roster

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The model's own copies of its adapters' configs, by name."""
        return self.roster.configs

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters, in order."""
        return list(self.roster.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The single active adapter's name, or a list of none or several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        """The (first) active adapter's config."""
        return self.peft_config[self.roster.first_active]

    @property
    def peft_type(self) -> Any:
        """The (first) active adapter's method."""
        return self.active_peft_config.peft_type

    def get_base_model(self) -> nn.Module:
        """The base model's own object, with the adapters in it."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # -- forward ------------------------------------------------------------------------------

    def forward(
        self, *args: Any, adapter_names: Sequence[Entry] | None = None, **kwargs: Any
    ) -> Any:
        """The base model's forward with the active adapters, or row by row with those named.

        Args:
            adapter_names: for each row of the batch a name, a list of names that act together, or
                ``"__base__"``.

        Raises:
            RoutingError: a name is unknown or merged, or the count is wrong.
        """
        with self._route(adapter_names, args, kwargs), spans_of_forward(self.roster, args, kwargs):
            args, kwargs = self._in_context(args, kwargs)
            return penalised(self.roster, self.get_base_model()(*args, **kwargs))

    def generate(
        self, *args: Any, adapter_names: Sequence[Entry] | None = None, **kwargs: Any
    ) -> Any:
        """The base model's ``generate``, with the same choice of adapters as `forward`."""
        config = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        repeats = 1
        for option in ("num_beams", "num_return_sequences"):
            repeats = max(repeats, kwargs.get(option) or getattr(config, option, None) or 1)
        route = self._route(adapter_names, args, kwargs, repeats)
        with route, spans_of_generate(self.roster, args, kwargs):
            args, kwargs = self._generating(args, kwargs)
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def mixed_batch(self, adapter_names: Sequence[Entry]) -> Iterator[None]:
        """Every call in the block is row by row with these adapters; what they share is made once.

        For loops of one's own over `forward`, whose names and errors it has. Written by hand inside
        the block (``parameter.data``), an adapter's values may not be seen before its end.
        """
        check_names(adapter_names, None, self.roster)
        with self.roster.routed(Route(list(adapter_names), 1, None)):
            yield

    def _route(
        self, names: Sequence[Entry] | None, args: Any, kwargs: Mapping[str, Any], repeats: int = 1
    ) -> AbstractContextManager[None]:
        if names is None:
            if self.roster.route is not None:  # in a `mixed_batch` block, where much can happen
                check_present(self.roster.route.adapters, self.roster)
            return nullcontext()
        first = next(
            (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None
        )
        if first is None:
            raise RoutingError("`adapter_names` needs a batch: no tensor was given as an argument.")
        check_names(names, first.shape[0], self.roster)
        tokens = first.shape[1] if first.dim() > 1 else None
        return self.roster.routed(Route(list(names), repeats, tokens))

    # -- lifecycle ----------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Graft a new adapter beside the others; it starts inactive and frozen.

        Raises:
            AdapterNameError: the name is taken or cannot name a folder.
            TargetError: the config does not fit the model; nothing was changed.
        """
        self.base_model.add_adapter(
            adapter_name,
            self._with_defaults(peft_config),
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active; see `Tuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `Tuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base's own outputs for the length of the block; no flag of any tensor changes."""
        with self.base_model.disabled():
            yield

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model with the adapters merged in; see `Tuner.merge_and_unload`."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """The base model as it was before the first adapter."""
        return self.base_model.unload()

    # -- numbers ------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameter counts; packed 4-bit weights count as what they hold."""
        trainable = total = 0
        for parameter, count in parameter_counts(self):
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print the counts of `get_nb_trainable_parameters` and their ratio in per cent."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(  # noqa: T201 (printing is what this method of PEFT is for)
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What is true of each adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """What is true of the whole model."""
        return get_model_status(self)

    # -- files --------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters in PEFT's format: ``default`` in the directory, others in a subfolder each.

        Args:
            selected_adapters: names; all by default.
            save_embedding_layers: adds the base's embedding matrices: True, False, or ``"auto"``
                for when the vocabulary was resized (`multigraft.embeddings`).
            is_main_process: only the main process writes. All must call where the model lies in
                parts on several processes; then it is the first that writes.
            path_initial_model_for_weight_conversion: save LoRA that takes a part out of the base
                (PiSSA and others) as plain LoRA; see `multigraft.saving.files_of`.
            state_dict: the whole model's gathered state dict, when it is sharded.
            kwargs: ``push_to_hub=True`` uploads them, too, with options of `push_to_hub`.

        Raises:
            CheckpointError: tensors are missing or the disk refuses; old files are unchanged.
        """
        if not safe_serialization:
            raise CheckpointError(
                "`safe_serialization` (=False): Multigraft writes safetensors only; pickles can "
                "run code when they are read. Leave it at True: PEFT reads these files."
            )
        names = self.roster.require(
            self.roster.names() if selected_adapters is None else selected_adapters
        )
        write_adapters(
            self.roster,
            save_directory,
            names,
            state_dict=state_dict,
            embeddings=save_embedding_layers,
            initial=path_initial_model_for_weight_conversion,
            is_writer=is_main_process,
        )
        if kwargs.pop("push_to_hub", False) and is_main_process:
            self.push_to_hub(
                kwargs.pop("repo_id", Path(save_directory).name),
                selected_adapters=names,
                save_embedding_layers=save_embedding_layers,
                **kwargs,
            )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> checkpoint.LoadReport:
        """Load an adapter from a directory or the hub; over an existing one of that name as well.

        Args:
            is_trainable: whether its parameters require gradients.
            torch_device: where its tensors go; beside their base layers by default.
            key_mapping: regular expressions to replacements for the file's keys.
            strict: fail on missing, unexpected and non-finite tensors.
            ignore_mismatched_sizes: leave tensors of another shape at their initial values.
            kwargs: where the files are; ``hotswap=True`` for `multigraft.hotswap.hotswap_adapter`.

        Returns:
            What the file and the model disagreed about, when that was allowed.

        Raises:
            CheckpointError: the files are damaged or do not fit; nothing was changed.
        """
        return load_into(
            self.base_model,
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            autocast=autocast_adapter_dtype,
            device=torch_device,
            key_mapping=key_mapping,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **kwargs,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A base model with an adapter from a directory or the hub; see `load_adapter`.

        Args:
            config: used instead of the file's config.
        """
        from multigraft.auto import class_for
        from multigraft.loading import read_config

        if config is None:
            config, kwargs = read_config(model_id, adapter_name, kwargs)
        klass = class_for(config) if cls is PeftModel else cls
        peft_model = klass(model, None)
        peft_model.load_adapter(
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            key_mapping=key_mapping,
            config=config,
            activate=True,
            **kwargs,
        )
        return peft_model

    def _with_defaults(self, config: PeftConfig) -> PeftConfig:
        """A copy that names its base model and saves the task's usual heads."""
        config = own_copy(config)
        base = self.get_base_model()
        own = getattr(base, "config", None)
        name = (
            own.get("_name_or_path")
            if isinstance(own, dict)
            else getattr(base, "name_or_path", None)
        )
        config.base_model_name_or_path = config.base_model_name_or_path or name or None
        save_task_heads(config, base, self.default_saved_modules)
        return config
