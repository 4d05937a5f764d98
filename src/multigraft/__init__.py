"""Multigraft: many adapters, one frozen base, side by side.

The names are PEFT's, so that ``from peft import ...`` becomes ``from multigraft import ...``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from multigraft.auto import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    get_peft_config,
    get_peft_model,
)
from multigraft.config import PeftConfig, PeftType, TaskType
from multigraft.errors import (
    AdapterNameError,
    AliasError,
    CheckpointError,
    ConfigError,
    DataError,
    MergeError,
    MissingExtraError,
    MultigraftError,
    MultigraftWarning,
    NestingError,
    NoMatchingPeftModuleError,
    PeftError,
    PeftWarning,
    RoutingError,
    SourceError,
    StateError,
    TargetError,
    TrainingError,
    UnsupportedError,
)
from multigraft.initialisations.corda import CordaConfig
from multigraft.initialisations.eva import EvaConfig
from multigraft.initialisations.loftq import LoftQConfig
from multigraft.initialisations.lora_ga import LoraGAConfig
from multigraft.layer import AdaptedLayer
from multigraft.loading import load_peft_weights
from multigraft.methods.adalora import AdaLoraConfig
from multigraft.methods.hira import HiraConfig
from multigraft.methods.ia3 import IA3Config
from multigraft.methods.ln_tuning import LNTuningConfig
from multigraft.methods.loha import LoHaConfig
from multigraft.methods.lokr import LoKrConfig
from multigraft.methods.lora import LoraConfig
from multigraft.methods.oft import OFTConfig
from multigraft.methods.trainable_tokens import TrainableTokensConfig
from multigraft.methods.vera import VeraConfig
from multigraft.model import PeftModel
from multigraft.prompts.adaption import AdaptionPromptConfig
from multigraft.prompts.config import PromptLearningConfig
from multigraft.prompts.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from multigraft.prompts.prefix_tuning import PrefixTuningConfig
from multigraft.prompts.prompt_tuning import PromptTuningConfig, PromptTuningInit
from multigraft.state import get_peft_model_state_dict, set_peft_model_state_dict
from multigraft.status import get_layer_status, get_model_status
from multigraft.tasks import (
    PeftMixedModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from multigraft.tuner import inject_adapter_in_model
from multigraft.variants import LoraRuntimeConfig
from multigraft.variants.arrow import ArrowConfig
from multigraft.variants.bdlora import BdLoraConfig
from multigraft.variants.kasa import KasaConfig
from multigraft.variants.monteclora import MontecloraConfig
from multigraft.variants.velora import VeloraConfig

if TYPE_CHECKING:
    from multigraft.arrow import create_arrow_model
    from multigraft.auto_models import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from multigraft.base_state import get_base_model_state_dict, set_base_model_state_dict
    from multigraft.calibration.corda import preprocess_corda
    from multigraft.calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
    from multigraft.calibration.loftq import replace_lora_weights_loftq
    from multigraft.calibration.loraga import preprocess_loraga
    from multigraft.combine.convert import convert_to_lora, save_as_lora
    from multigraft.combine.extract import Extraction, extract_lora
    from multigraft.diagnosis.doctor import doctor
    from multigraft.inspection.diff import diff
    from multigraft.inspection.structure import inspect
    from multigraft.inspection.targets import targets
    from multigraft.inspection.verify import verify
    from multigraft.kappa import find_kappa_target_modules
    from multigraft.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
    from multigraft.kinds import BaseTunerLayer, LoraLayer
    from multigraft.prompts.encoders import (
        PrefixEncoder,
        PromptEmbedding,
        PromptEncoder,
        shift_tokens_right,
    )
    from multigraft.prompts.given import (
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
        prompt_embeddings_from_past_key_values,
    )
    from multigraft.tuner_classes import (
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        AdaLoraModel,
        AdaptionPromptModel,
        HiraModel,
        IA3Model,
        LNTuningModel,
        LoHaModel,
        LoKrModel,
        LoraModel,
        OFTModel,
        TrainableTokensModel,
        VeraModel,
    )

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdaptedLayer",
    "AdapterNameError",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AliasError",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BaseTunerLayer",
    "BdLoraConfig",
    "CheckpointError",
    "ConfigError",
    "CordaConfig",
    "DataError",
    "EvaConfig",
    "Extraction",
    "HiraConfig",
    "HiraModel",
    "IA3Config",
    "IA3Model",
    "KasaConfig",
    "LNTuningConfig",
    "LNTuningModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "MergeError",
    "MissingExtraError",
    "MontecloraConfig",
    "MultigraftError",
    "MultigraftWarning",
    "NestingError",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "OFTModel",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RoutingError",
    "SourceError",
    "StateError",
    "TargetError",
    "TaskType",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "TrainingError",
    "UnsupportedError",
    "VeloraConfig",
    "VeraConfig",
    "VeraModel",
    "__version__",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "create_arrow_model",
    "diff",
    "doctor",
    "extract_lora",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "inspect",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "targets",
    "verify",
]

_LATER = {
    "arrow": ["create_arrow_model"],
    "auto_models": [
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ],
    "base_state": ["get_base_model_state_dict", "set_base_model_state_dict"],
    "calibration.corda": ["preprocess_corda"],
    "calibration.eva": ["get_eva_state_dict", "initialize_lora_eva_weights"],
    "calibration.loftq": ["replace_lora_weights_loftq"],
    "calibration.loraga": ["preprocess_loraga"],
    "combine.convert": ["convert_to_lora", "save_as_lora"],
    "combine.extract": ["Extraction", "extract_lora"],
    "diagnosis.doctor": ["doctor"],
    "inspection.diff": ["diff"],
    "inspection.structure": ["inspect"],
    "inspection.targets": ["targets"],
    "inspection.verify": ["verify"],
    "kappa": ["find_kappa_target_modules"],
    "kbit": ["cast_mixed_precision_params", "prepare_model_for_kbit_training"],
    "kinds": ["BaseTunerLayer", "LoraLayer"],
    "prompts.encoders": [
        "PrefixEncoder",
        "PromptEmbedding",
        "PromptEncoder",
        "shift_tokens_right",
    ],
    "prompts.given": [
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ],
    "tuner_classes": [
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "AdaLoraModel",
        "AdaptionPromptModel",
        "HiraModel",
        "IA3Model",
        "LNTuningModel",
        "LoHaModel",
        "LoKrModel",
        "LoraModel",
        "OFTModel",
        "TrainableTokensModel",
        "VeraModel",
    ],
}
"""Public names by their module, which is imported when one of them is first asked for."""
_HOMES = {name: module for module, names in _LATER.items() for name in names}


if not TYPE_CHECKING:  # to a type checker, a name that is not there is a mistake

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
