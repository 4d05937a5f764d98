"""PEFT's class of models for each method: ``LoraModel(model, config, "default")``.

One class, `Tuner`, serves all methods, and adapters of several stand side by side on one model. So
these are ways to begin, with one adapter. They are questions, too: whether there is an adapter of
that method is ``isinstance(model.base_model, LoraModel)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from multigraft import kinds
from multigraft.config import PeftConfig, PeftType
from multigraft.errors import ConfigError
from multigraft.methods import METHODS
from multigraft.prompts.encoders import PrefixEncoder, PromptEmbedding, PromptEncoder
from multigraft.tuner import Tuner, base_of, inject_adapter_in_model


class AskedOfTuner(type):
    """The type of a class whose instances are the tuners with an adapter of its methods."""

    methods: frozenset[str]

    def __instancecheck__(cls, instance: object) -> bool:
        if type.__instancecheck__(cls, instance):
            return True
        return isinstance(instance, Tuner) and any(
            str(config.peft_type) in cls.methods for config in instance.peft_config.values()
        )


class MethodTuner(Tuner, metaclass=AskedOfTuner):
    """A model with an adapter of one method, grafted in place; others may join it.

    Args:
        model: the base model; a handle (`PeftModel`) stands for its base.
        peft_config: the adapter's config, or a dictionary of them by name.
        adapter_name: its name.
        low_cpu_mem_usage: make the adapter's tensors on the meta device.
        state_dict: see `inject_adapter_in_model`.

    Raises:
        ConfigError: the config is of another method, or there is none of this name.
        TargetError: the config does not fit the model; the model is as it was.
    """

    methods: ClassVar[frozenset[str]] = frozenset()
    tuner_layer_cls: ClassVar[type[kinds.BaseTunerLayer]] = kinds.BaseTunerLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        config, base = self._chosen(peft_config, adapter_name), base_of(model)
        inject_adapter_in_model(config, base, adapter_name, low_cpu_mem_usage, state_dict)
        super().__init__(base)

    def _chosen(self, given: PeftConfig | Mapping[str, PeftConfig], name: str) -> PeftConfig:
        configs = given if isinstance(given, Mapping) else {name: given}
        if name not in configs:
            raise ConfigError(f"`peft_config` has no `{name}`; it has {list(configs)}.")
        config, mine = configs[name], sorted(self.methods)
        if str(getattr(config, "peft_type", None)) not in mine:
            raise ConfigError(
                f"{type(self).__name__} begins with an adapter of {' or '.join(mine)}, and "
                f"`peft_config` is a {type(config).__name__}. Use get_peft_model() for any method."
            )
        return config


class LoraModel(MethodTuner):
    """A model with a LoRA of any variant, or an AdaLoRA."""

    methods = frozenset({"LORA", "ADALORA"})
    target_module_mapping = METHODS["LORA"].default_targets
    tuner_layer_cls = kinds.LoraLayer


class AdaLoraModel(LoraModel):
    """A model with an AdaLoRA."""

    methods = frozenset({"ADALORA"})
    target_module_mapping = METHODS["ADALORA"].default_targets
    tuner_layer_cls = kinds.AdaLoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, adapter_name, **kwargs)


class HiraModel(MethodTuner):
    """A model with a HiRA."""

    methods = frozenset({"HIRA"})
    target_module_mapping = METHODS["HIRA"].default_targets
    tuner_layer_cls = kinds.HiraLayer


class IA3Model(MethodTuner):
    """A model with an IA3."""

    methods = frozenset({"IA3"})
    tuner_layer_cls = kinds.IA3Layer


class LNTuningModel(MethodTuner):
    """A model with trained copies of its norms."""

    methods = frozenset({"LN_TUNING"})
    target_module_mapping = METHODS["LN_TUNING"].default_targets
    tuner_layer_cls = kinds.LNTuningLayer


class LoHaModel(MethodTuner):
    """A model with a LoHa."""

    methods = frozenset({"LOHA"})
    target_module_mapping = METHODS["LOHA"].default_targets
    tuner_layer_cls = kinds.LoHaLayer


class LoKrModel(MethodTuner):
    """A model with a LoKr."""

    methods = frozenset({"LOKR"})
    target_module_mapping = METHODS["LOKR"].default_targets
    tuner_layer_cls = kinds.LoKrLayer


class OFTModel(MethodTuner):
    """A model with an OFT."""

    methods = frozenset({"OFT"})
    target_module_mapping = METHODS["OFT"].default_targets
    tuner_layer_cls = kinds.OFTLayer


class TrainableTokensModel(MethodTuner):
    """A model with an adapter of single tokens."""

    methods = frozenset({"TRAINABLE_TOKENS"})
    tuner_layer_cls = kinds.TrainableTokensLayer


class VeraModel(MethodTuner):
    """A model with a VeRA."""

    methods = frozenset({"VERA"})
    target_module_mapping = METHODS["VERA"].default_targets
    tuner_layer_cls = kinds.VeraLayer
    uses_shared_state = True


class AdaptionPromptModel(MethodTuner):
    """A model with an adaption prompt, and the handle that holds its tensors.

    Args:
        model: the base model; a handle (`PeftModel`) stands for its base.
        configs: the adapter's config, or a dictionary of them by name.
        adapter_name: its name.
    """

    methods = frozenset({"ADAPTION_PROMPT"})

    def __init__(
        self,
        model: nn.Module,
        configs: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
    ) -> None:
        config = self._chosen(configs, adapter_name)
        Tuner.__init__(self, base_of(model))
        self.add_adapter(adapter_name, config, activate=True)
        self.roster.show_contexts(self)


PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type[MethodTuner]] = {
    PeftType.LORA: LoraModel,
    PeftType.ADALORA: AdaLoraModel,
    PeftType.HIRA: HiraModel,
    PeftType.IA3: IA3Model,
    PeftType.LN_TUNING: LNTuningModel,
    PeftType.LOHA: LoHaModel,
    PeftType.LOKR: LoKrModel,
    PeftType.OFT: OFTModel,
    PeftType.TRAINABLE_TOKENS: TrainableTokensModel,
    PeftType.VERA: VeraModel,
}
"""Every method's adapters stand beside those of any other."""
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[nn.Module]] = {
    **PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PeftType.ADAPTION_PROMPT: AdaptionPromptModel,
    PeftType.P_TUNING: PromptEncoder,
    PeftType.PREFIX_TUNING: PrefixEncoder,
    PeftType.PROMPT_TUNING: PromptEmbedding,
}
