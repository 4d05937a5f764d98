"""Which modules PEFT has, and where each of their names is here.

Other packages import names from deep inside PEFT; what is listed here is what they find. Whatever
is missing is missing on purpose: it belongs to a method that is not built, or to PEFT's inside.

This file, like the two that read it, uses the standard library alone: see `child`.
"""

from __future__ import annotations

VERSION = "0.21.2"
"""The version of PEFT whose interface this is; what `importlib.metadata` is told."""

HOMES = {
    "multigraft.combine.intruders": ("reduce_intruder_dimension",),
    "multigraft.compat.conversions": ("build_peft_weight_mapping",),
    "multigraft.compat.pieces": (
        "CONFIG_NAME",
        "EMBEDDING_LAYER_NAMES",
        "INCLUDE_LINEAR_LAYERS_SHORTHAND",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "WEIGHTS_NAME",
        "_get_submodules",
        "_set_adapter",
        "cast_adapter_dtype",
        "delete_adapter",
        "factorization",
        "fsdp_auto_wrap_policy",
        "infer_device",
        "set_adapter",
        "set_requires_grad",
        "transpose",
    ),
    "multigraft.compat.availability": (
        "is_aqlm_available",
        "is_bnb_4bit_available",
        "is_bnb_available",
        "is_diffusers_available",
        "is_eetq_available",
        "is_gptqmodel_available",
        "is_hqq_available",
        "is_inc_available",
        "is_optimum_available",
        "is_te_available",
        "is_te_pytorch_available",
        "is_torch_tpu_available",
        "is_torchao_available",
        "is_xpu_available",
    ),
    "multigraft.compat.questions": (
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "Embedding",
        "Linear",
        "Linear4bit",
        "Linear8bitLt",
    ),
    "multigraft.helpers": (
        "DoraCaching",
        "KappaTuneSelector",
        "MontecloraTrainerMixin",
        "check_if_peft_model",
        "disable_input_dtype_casting",
        "rescale_adapter_scale",
        "update_forward_signature",
        "update_generate_signature",
        "update_signature",
    ),
    "multigraft.hotswap": (
        "check_hotswap_configs_compatible",
        "hotswap_adapter",
        "hotswap_adapter_from_state_dict",
        "prepare_model_for_compiled_hotswap",
    ),
    "multigraft.kinds": (
        "AdaLoraLayer",
        "AuxiliaryTrainingWrapper",
        "HiraLayer",
        "IA3Layer",
        "LNTuningLayer",
        "LoHaLayer",
        "LoKrLayer",
        "ModulesToSaveWrapper",
        "OFTLayer",
        "ParamWrapper",
        "TrainableTokensLayer",
        "TrainableTokensWrapper",
        "VeraLayer",
    ),
    "multigraft.optimizers": (
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "create_riemannian_optimizer",
    ),
    "multigraft.status": ("TunerLayerStatus", "TunerModelStatus"),
}
"""Names by our module that holds them, where they are not public names of `multigraft` itself."""

RENAMED = {
    "BaseTuner": "multigraft.tuner:Tuner",
    "PeftConfigMixin": "multigraft.config:PeftConfig",
    "LoraFAOptimizer": "multigraft.optimizers.lorafa:LoraFAOptimizer",
}
"""Names that stand for another one of ours."""

_TASKS = (
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction "
    "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
    "PeftModelForTokenClassification"
)
_STATES = "get_peft_model_state_dict set_peft_model_state_dict"
_FILES = "CONFIG_NAME SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"
_TARGETS = "INCLUDE_LINEAR_LAYERS_SHORTHAND TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
_WRAPPERS = "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper"
_PREPARED = "cast_mixed_precision_params infer_device prepare_model_for_kbit_training transpose"
_MAPPINGS = (
    "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING"
)
_PREFIXES = "PEFT_TYPE_TO_PREFIX_MAPPING"
_LAYER_VERBS = "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"
_BASES = "Conv1d Conv2d Conv3d Embedding Linear Linear4bit Linear8bitLt ParamWrapper"
_LORA = (
    "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig "
    "LoraLayer LoraModel LoraRuntimeConfig MontecloraConfig VeloraConfig convert_to_lora "
    f"create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga "
    f"save_as_lora {_BASES}"
)
_METHODS = {
    "adalora": "AdaLoraConfig AdaLoraLayer AdaLoraModel",
    "adaption_prompt": "AdaptionPromptConfig",
    "hira": "HiraConfig HiraLayer HiraModel",
    "ia3": "IA3Config IA3Layer IA3Model",
    "ln_tuning": "LNTuningConfig LNTuningLayer LNTuningModel",
    "loha": "LoHaConfig LoHaLayer LoHaModel",
    "lokr": "LoKrConfig LoKrLayer LoKrModel factorization",
    "lora": _LORA,
    "oft": "OFTConfig OFTLayer OFTModel",
    "p_tuning": "PromptEncoderConfig PromptEncoderReparameterizationType",
    "prefix_tuning": "PrefixTuningConfig",
    "prompt_tuning": "PromptTuningConfig PromptTuningInit",
    "trainable_tokens": "TrainableTokensConfig TrainableTokensLayer TrainableTokensModel",
    "vera": "VeraConfig VeraLayer VeraModel",
}
_PARTS = ("config", "layer", "model")
"""A method's package and each of these in it show the same names."""

_PROMPTS = ("p_tuning", "prefix_tuning", "prompt_tuning")
"""Methods that act at no layer: only their configs are modules here."""

_ALL_METHODS = " ".join(
    name
    for names in _METHODS.values()
    for name in names.split()
    if not name.endswith("Layer") and name not in f"{_BASES} CordaConfig factorization"
)

MODULES = {
    "peft": f"* {_MAPPINGS}",
    "peft.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM "
        "AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification "
        f"MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftConfig {_TASKS}"
    ),
    "peft.config": "PeftConfig PeftConfigMixin PeftType PromptLearningConfig TaskType CONFIG_NAME",
    "peft.functional": f"inject_adapter_in_model {_STATES} {_LAYER_VERBS}",
    "peft.helpers": " ".join((*HOMES["multigraft.helpers"], "find_kappa_target_modules")),
    "peft.import_utils": " ".join(HOMES["multigraft.compat.availability"]),
    "peft.mapping": f"PeftType get_peft_config inject_adapter_in_model {_MAPPINGS} {_PREFIXES}",
    "peft.mapping_func": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PeftConfig PeftMixedModel "
        f"PeftModel get_peft_model {_PREFIXES}"
    ),
    "peft.mixed_model": "PeftConfig PeftMixedModel",
    "peft.optimizers": " ".join(HOMES["multigraft.optimizers"]),
    "peft.optimizers.lorafa": "LoraFAOptimizer create_lorafa_optimizer",
    "peft.optimizers.loraplus": "create_loraplus_optimizer",
    "peft.optimizers.riemannian": "create_riemannian_optimizer",
    "peft.peft_model": (
        "PeftConfig PeftType TaskType TunerLayerStatus TunerModelStatus get_layer_status "
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING SAFETENSORS_WEIGHTS_NAME "
        f"WEIGHTS_NAME get_model_status load_peft_weights {_TASKS} {_STATES} {_PREFIXES}"
    ),
    "peft.tuners": _ALL_METHODS,
    "peft.tuners.lora.arrow": "ArrowConfig create_arrow_model",
    "peft.tuners.lora.bnb": "Linear4bit Linear8bitLt",
    "peft.tuners.lora.conversion": "convert_to_lora save_as_lora",
    "peft.tuners.lora.corda": "preprocess_corda",
    "peft.tuners.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "peft.tuners.lora.intruders": "reduce_intruder_dimension",
    "peft.tuners.lora.loraga": "preprocess_loraga",
    "peft.tuners.tuners_utils": (
        "BaseTuner BaseTunerLayer EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
        f"NoMatchingPeftModuleError PeftConfig PeftType PeftWarning TaskType {_LAYER_VERBS}"
    ),
    "peft.utils": (
        "NoMatchingPeftModuleError PeftError PeftType PeftWarning TaskType _get_submodules "
        "_set_adapter get_base_model_state_dict load_peft_weights replace_lora_weights_loftq "
        f"set_base_model_state_dict {_STATES} {_FILES} {_TARGETS} {_WRAPPERS} {_PREPARED}"
    ),
    "peft.utils.constants": f"EMBEDDING_LAYER_NAMES {_FILES} {_TARGETS}",
    "peft.utils.error": "NoMatchingPeftModuleError PeftError",
    "peft.utils.hotswap": " ".join(HOMES["multigraft.hotswap"]),
    "peft.utils.loftq_utils": "replace_lora_weights_loftq",
    "peft.utils.other": (
        "EMBEDDING_LAYER_NAMES _get_submodules _set_adapter fsdp_auto_wrap_policy "
        f"{_FILES} {_TARGETS} {_WRAPPERS} {_PREPARED}"
    ),
    "peft.utils.peft_types": "PeftType TaskType",
    "peft.utils.save_and_load": (
        "get_base_model_state_dict load_peft_weights set_base_model_state_dict "
        f"PEFT_TYPE_TO_TUNER_MAPPING SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME {_STATES}"
    ),
    "peft.utils.transformers_weight_conversion": " ".join(HOMES["multigraft.compat.conversions"]),
    "peft.utils.warning": "PeftWarning",
}
"""PEFT's modules and the names in each; ``*`` stands for every public name of `multigraft`."""

for _method, _names in _METHODS.items():
    _parts = _PARTS[:1] if _method in _PROMPTS else _PARTS
    for _module in (_method, *(f"{_method}.{part}" for part in _parts)):
        MODULES[f"peft.tuners.{_module}"] = _names


def home_of(name: str) -> tuple[str, str]:
    """The module of ours that holds a name of PEFT's, and what it is called there."""
    if name in RENAMED:
        module, _, own = RENAMED[name].partition(":")
        return module, own
    for module, names in HOMES.items():
        if name in names:
            return module, name
    return "multigraft", name
