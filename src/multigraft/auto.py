"""From a config to the class that serves its task, and `get_peft_model`; PEFT's tables of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from multigraft import tasks
from multigraft.config import CONFIGS, PeftConfig, PeftType, TaskType
from multigraft.errors import ConfigError
from multigraft.model import PeftModel
from multigraft.prepare import own_copy

TASK_CLASSES: dict[str, type[PeftModel]] = {
    TaskType.CAUSAL_LM: tasks.PeftModelForCausalLM,
    TaskType.FEATURE_EXTRACTION: tasks.PeftModelForFeatureExtraction,
    TaskType.QUESTION_ANS: tasks.PeftModelForQuestionAnswering,
    TaskType.SEQ_2_SEQ_LM: tasks.PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: tasks.PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: tasks.PeftModelForTokenClassification,
}


class ConfigsByType(Mapping[PeftType, type[PeftConfig]]):
    """Every method's config class by its ``peft_type``, those of one's own methods among them."""

    def __getitem__(self, key: PeftType) -> type[PeftConfig]:
        if key not in CONFIGS:
            raise KeyError(key)
        return CONFIGS[str(key)]

    def __iter__(self) -> Iterator[PeftType]:
        return map(PeftType, CONFIGS)

    def __len__(self) -> int:
        return len(list(CONFIGS))


PEFT_TYPE_TO_CONFIG_MAPPING = ConfigsByType()
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = TASK_CLASSES
"""PEFT's name for `TASK_CLASSES`."""


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that these values describe, of the class that their ``peft_type`` names.

    Files are read by `PeftConfig.from_pretrained`, which keeps keys that it does not know.

    Raises:
        ConfigError: ``peft_type`` is missing, or a value is not allowed.
        UnsupportedError: ``peft_type`` names a method that we do not have.
        TypeError: a key is no field of the config.
    """
    if config_dict.get("peft_type") is None:
        raise ConfigError("`config_dict` has no `peft_type`, which says what it is the config of.")
    return CONFIGS[str(config_dict["peft_type"])](**config_dict)


def class_for(config: PeftConfig) -> type[PeftModel]:
    """The `PeftModel` class of the config's task."""
    return TASK_CLASSES.get(str(config.task_type), PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Graft an adapter onto a model and return the handle to both.

    Called again on the same model (or on a handle to it), it grafts a further adapter beside the
    first ones; both handles see the same adapters.

    Args:
        model: the base model, which is adapted in place.
        peft_config: what to graft; it is copied, never changed.
        adapter_name: its name; letters, digits and most punctuation, no path separators.
        mixed: give a `PeftMixedModel`; adapters of different methods need no special class here.
        autocast_adapter_dtype: keep float32 adapters on a half-precision base.
        revision: the base model's revision on the hub, noted in the config.
        low_cpu_mem_usage: make the adapter's tensors on the meta device.

    Raises:
        AdapterNameError: the name is taken or cannot name a folder.
        TargetError: the config does not fit the model; the model is as it was.
        UnsupportedError: model or config is none.
    """
    peft_config = own_copy(peft_config)
    if revision is not None:
        peft_config.revision = peft_config.revision or revision
    klass = tasks.PeftMixedModel if mixed else class_for(peft_config)
    return klass(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
