"""Why a name of PEFT's, or a part of one, is not here or is another; read by `api_parity`."""

from __future__ import annotations

CARTRIDGE = "serves Cartridge, a method that is not built"
CONTEXT = (
    "prompts are contexts of the model's handle here, made by their configs; no module of one's own"
)
OLD = "the layout of BLOOM's cache in old transformers, which no supported version has"

NAMES = {
    "AdaptionPromptModel": "adaption prompts are held by the model's handle: get_peft_model()",
    "CPTEmbedding": "serves CPT, a method that is not built",
    "CartridgeEncoder": CARTRIDGE,
    "MultitaskPromptTuningInit": "serves multitask prompt tuning, a method that is not built",
    "PrefixEncoder": CONTEXT,
    "PromptEmbedding": CONTEXT,
    "PromptEncoder": CONTEXT,
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "empty in PEFT as well",
    "bloom_model_postprocess_past_key_value": OLD,
    "compose_cartridge_adapters": CARTRIDGE,
    "initialize_kv_prefix_from_past_key_values": "not built: prefixes start at random",
    "initialize_kv_prefix_from_text": "not built: prefixes start at random",
    "prompt_embeddings_from_past_key_values": "not built: prefixes start at random",
    "shift_tokens_right": "not built yet: transformers has it for each architecture",
}
"""Names that are not here."""

PARTS = {
    "AdaLoraConfig(runtime_config=<factory>)": "None, which means the same",
    "AdaLoraModel(config)": "`peft_config` here, as in the other classes; second, as in PEFT",
    "layers_mapping": "what layers there are is asked of `multigraft.bases`",
    "resize_modules_by_rank_pattern": "not needed: loading puts the file's ranks in their places",
    "resize_state_dict_by_rank_pattern": "not needed: saving leaves pruned ranks out",
    "base_model_torch_dtype": "not built yet: get_base_model().dtype",
    "check_kwargs": "not built yet: configs refuse unknown keys themselves",
    "from_json_file": "not built yet: json.load()",
    "from_peft_type": "not built yet: get_peft_config()",
    "has_active_enabled_adapter": "not built yet: get_model_status()",
    "inject_adapter": "not built yet: add_adapter()",
    "get_model_config": "not built yet: get_base_model().config",
    "is_adaption_prompt": "not built yet: peft_type",
    "modules_to_save": "not built yet: the config's field",
    "prepare_model_for_gradient_checkpointing": "not needed: done when an adapter is added",
    "push_to_hub": "not built yet: huggingface_hub's upload_folder()",
    "set_modules_to_save": "not built yet: the config's field",
    "subtract_mutated_init": "not needed: save_pretrained() converts",
    "target_module_mapping": "not built yet: the usual modules are in `multigraft.defaults`",
    "uses_shared_state": "asked of methods, not of the tuner",
    "prepare_inputs_for_generation": "the base model's own: no second one is needed",
    "get_prompt(task_ids)": "serves multitask prompt tuning, a method that is not built",
    "get_prompt(max_cache_len)": "caches of fixed length take the prefix when they are made",
    "PeftModelForTokenClassification(peft_config=None)": "None fails in PEFT",
    "save_pretrained(safe_serialization=False)": "safetensors only",
    "from_pretrained(subfolder=None)": "an empty string, which means the same",
}
"""Members and parameters that are not here, or whose default is another."""
