"""Why a name of PEFT's, or a part of one, is not here or is another; read by `api_parity`."""

from __future__ import annotations

CARTRIDGE = "serves Cartridge, a method that is not built"
OLD = "the layout of BLOOM's cache in old transformers, which no supported version has"

NAMES = {
    "CPTEmbedding": "serves CPT, a method that is not built",
    "CartridgeEncoder": CARTRIDGE,
    "MultitaskPromptTuningInit": "serves multitask prompt tuning, a method that is not built",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "empty in PEFT as well",
    "bloom_model_postprocess_past_key_value": OLD,
    "compose_cartridge_adapters": CARTRIDGE,
}
"""Names that are not here."""

PARTS = {
    "AdaLoraConfig(runtime_config=<factory>)": "None, which means the same",
    "layers_mapping": "what layers there are is asked of `multigraft.bases`",
    "resize_modules_by_rank_pattern": "not needed: loading puts the file's ranks in their places",
    "resize_state_dict_by_rank_pattern": "not needed: saving leaves pruned ranks out",
    "set_modules_to_save": "a step of PEFT's constructor: the config's field says it",
    "subtract_mutated_init": "not needed: save_pretrained() converts",
    "prepare_inputs_for_generation": "the base model's own, whatever adapter is active",
    "PeftModelForTokenClassification(peft_config=None)": "None fails in PEFT",
    "save_pretrained(safe_serialization=False)": "safetensors only",
}
"""Members and parameters that are not here, or whose default is another."""
