"""Which tests prove what of PEFT's LoRA: the rows of docs/parity.md, without PEFT's own names.

A test is its path below ``tests/`` and its function or class, ``::`` between them.
"""

from __future__ import annotations

Tests = tuple[str, ...]

LORA = "methods/test_lora.py::TestLora"
TARGETS = "test_target_parity.py::test_these_options_mean_the_same_modules"
NAMES = "test_target_parity.py::test_any_names_mean_the_same_modules"
CONFIG_FILES = "test_checkpoint_parity.py::test_both_write_the_same_config"
BDLORA = "variants/test_bdlora.py::TestBdLora"
ARROW = "variants/test_arrow.py::test_outputs_agree"
MONTE = "variants/test_monteclora.py::TestMonteclora"
EVA = "calibration/test_eva.py::test_directions_ranks_and_scalings_are_pefts"
CORDA = "calibration/test_corda.py::test_it_begins_where_pefts_does"
LORA_GA = "calibration/test_loraga.py::test_it_begins_where_pefts_does_up_to_signs"
LOFTQ = "initialisations/test_loftq.py::test_weights_and_factors_are_pefts"
FROM_THE_WEIGHT = "initialisations/test_from_the_weight.py::test_factors_begin_where_pefts_do"

FIELDS: dict[str, Tests] = {
    "alora_invocation_tokens": ("variants/test_alora.py::test_outputs_and_gradients_agree",),
    "alpha_pattern": (LORA, "test_config.py::test_patterns_mean_what_they_mean_in_peft"),
    "arrow_config": (ARROW, "variants/test_arrow.py::test_peft_s_files_of_a_router_load"),
    "auto_mapping": (CONFIG_FILES,),
    "base_model_name_or_path": (
        CONFIG_FILES,
        "test_model.py::test_configs_note_the_base_that_they_belong_to",
    ),
    "bias": (
        "test_behaviour_parity.py::test_outputs_are_equal",
        "bases/test_attention.py::test_trained_biases_are_pefts",
        "methods/test_bias.py::test_each_adapter_has_its_own_and_the_bases_bias_is_nobodys",
    ),
    "corda_config": (CORDA, "calibration/test_corda.py::test_the_config_comes_back_from_its_file"),
    "ensure_weight_tying": (
        "methods/test_ensure_weight_tying.py::test_outputs_and_files_are_pefts",
    ),
    "eva_config": (EVA,),
    "exclude_modules": (NAMES, TARGETS),
    "fan_in_fan_out": (
        CONFIG_FILES,
        "test_prepare.py::test_the_layers_say_how_they_are_stored_whatever_the_config_said",
    ),
    "inference_mode": ("test_tuner.py::test_a_config_for_inference_starts_frozen",),
    "init_lora_weights": ("methods/test_lora.py::test_initial_values_are_distributed_as_pefts",),
    "kasa_config": ("variants/test_kasa.py::TestKasa",),
    "layer_replication": (
        "weaknesses/test_t19_replicated_layers.py"
        "::test_replicas_have_adapters_of_their_own_as_in_peft",
        "weaknesses/test_t19_replicated_layers.py::test_files_go_both_ways",
    ),
    "layers_pattern": (CONFIG_FILES, "test_checkpoint_parity.py::test_both_write_the_same_tensors"),
    "layers_to_transform": (NAMES,),
    "loftq_config": (
        LOFTQ,
        "initialisations/test_loftq.py::test_both_spellings_of_its_config_are_read",
    ),
    "lora_alpha": (
        LORA,
        "methods/test_lora.py::test_the_scaling_is_alpha_over_the_rank_or_over_its_root",
    ),
    "lora_bias": (
        LORA,
        "storage/test_against_peft.py"
        "::test_a_bias_is_merged_with_the_scale_that_the_forward_gives_it",
    ),
    "lora_dropout": (
        "test_training_parity.py::test_dropout_with_the_same_seed_gives_the_same_numbers",
    ),
    "lora_ga_config": (LORA_GA,),
    "megatron_config": (
        "bases/test_megatron.py::test_outputs_and_gradients_are_pefts_of_plain_layers",
        "bases/test_megatron.py::test_two_ranks_compute_what_one_computes",
    ),
    "megatron_core": ("bases/test_megatron.py::test_a_core_of_ones_own_is_named",),
    "modules_to_save": (
        "test_behaviour_parity.py::test_outputs_are_equal",
        "test_checkpoint_parity.py"
        "::test_modules_that_peft_saves_by_the_end_of_their_name_are_loaded",
        "weaknesses/test_t01_saved_module_beside_lora.py"
        "::test_t01_a_saved_head_and_a_lora_on_it_stand_side_by_side",
    ),
    "monteclora_config": (MONTE,),
    "peft_type": (CONFIG_FILES,),
    "peft_version": (CONFIG_FILES,),
    "qalora_group_size": (
        "variants/test_qalora.py::test_outputs_and_gradients_agree",
        "variants/test_qalora.py::test_the_number_of_groups_scales_the_mean",
    ),
    "r": (LORA,),
    "rank_pattern": (LORA, "test_config.py::test_patterns_mean_what_they_mean_in_peft"),
    "revision": ("test_auto.py::test_a_revision_is_noted_unless_the_config_has_one",),
    "runtime_config": (
        "variants/test_runtime.py::test_first_norms_are_computed_on_the_accelerator_on_request",
        "variants/test_runtime.py::test_no_file_holds_it",
    ),
    "target_modules": (NAMES, TARGETS),
    "target_parameters": (
        "bases/test_experts.py::test_outputs_and_gradients_are_pefts",
        "bases/test_experts.py::test_files_go_both_ways",
        "bases/test_attention.py::test_target_parameters_of_an_attention_are_pefts",
    ),
    "task_type": (
        "test_auto.py::test_every_task_has_a_class_and_a_config_without_one_the_common_base",
    ),
    "trainable_token_indices": (
        "methods/test_trainable_tokens.py::TestBesideLora",
        "methods/test_trainable_tokens.py::test_a_tied_head_uses_the_trained_rows_as_in_peft",
    ),
    "use_bdlora": (BDLORA,),
    "use_dora": (
        "variants/test_dora.py::TestDora",
        "storage/test_against_peft.py::test_outputs_and_gradients_are_pefts",
    ),
    "use_qalora": ("variants/test_qalora.py::test_outputs_and_gradients_agree",),
    "use_rslora": (LORA,),
    "velora_config": (
        "variants/test_velora.py::TestVelora",
        "variants/test_velora.py::test_gradients_in_training_agree",
    ),
}
"""Fields of `LoraConfig`."""

STARTS: dict[str, Tests] = {
    "True": (LORA, "methods/test_lora.py::test_initial_values_are_distributed_as_pefts"),
    "False": ("methods/test_lora.py::test_initial_values_are_distributed_as_pefts",),
    "gaussian": ("methods/test_lora.py::test_initial_values_are_distributed_as_pefts",),
    "eva": (EVA, "calibration/test_eva.py::test_it_begins_at_no_change_trains_and_reloads"),
    "olora": (
        FROM_THE_WEIGHT,
        "initialisations/test_from_the_weight.py::test_pefts_files_give_pefts_output",
    ),
    "pissa": (
        FROM_THE_WEIGHT,
        "initialisations/test_from_the_weight.py::test_peft_reads_our_files",
    ),
    "pissa_niter_[number of iters]": (
        "initialisations/test_from_the_weight.py"
        "::test_a_random_decomposition_with_iterations_is_near_the_exact_one",
    ),
    "corda": (CORDA,),
    "loftq": (LOFTQ,),
    "lora_ga": (LORA_GA,),
    "orthogonal": ("initialisations/test_orthogonal.py::test_values_are_distributed_as_pefts",),
    "mica": ("variants/test_mica.py::TestMica",),
}
"""Values of `init_lora_weights`."""

OPTIONS: dict[str, dict[str, Tests]] = {
    "ArrowConfig": {
        "top_k": (ARROW,),
        "router_temperature": (ARROW,),
        "use_gks": (ARROW,),
        "task_adapter_names": (
            "variants/test_arrow.py::test_experts_are_those_that_the_config_names",
        ),
        "gks_adapter_names": (ARROW,),
        "rng_seed": (
            ARROW,
            "variants/test_arrow.py::test_without_a_seed_the_prototype_is_the_singular_vector",
        ),
    },
    "BdLoraConfig": {
        "target_modules_bd_a": (BDLORA,),
        "target_modules_bd_b": (BDLORA,),
        "nblocks": (BDLORA,),
        "match_strict": (
            BDLORA,
            "variants/test_bdlora.py::test_what_does_not_fit_the_layer_is_refused",
        ),
    },
    "CordaConfig": {
        "cache_file": (
            "calibration/test_corda.py::test_files_of_either_library_do_in_the_place_of_data",
        ),
        "covariance_file": (
            "calibration/test_corda.py::test_files_of_either_library_do_in_the_place_of_data",
        ),
        "corda_method": (CORDA,),
        "verbose": (
            "calibration/test_options.py::test_cordas_progress_is_shown_on_request_and_changes_nothing",
        ),
        "use_float16_for_covariance": (
            "calibration/test_options.py::test_cordas_sums_may_be_in_the_inputs_own_dtype",
        ),
        "prune_temporary_fields": (
            "calibration/test_corda.py::test_the_model_is_as_before_and_does_not_know",
        ),
    },
    "EvaConfig": {
        "rho": (EVA,),
        "tau": (EVA,),
        "use_label_mask": (EVA,),
        "label_mask_value": (
            "calibration/test_options.py::test_evas_label_that_does_not_count_may_be_another",
        ),
        "whiten": (
            EVA,
            "calibration/test_eva.py"
            "::test_whitened_directions_are_divided_once_where_layers_share_an_input",
        ),
        "adjust_scaling_factors": (EVA,),
    },
    "KasaConfig": {
        "beta": ("variants/test_kasa.py::test_the_loss_gets_the_regulariser_as_peft_gives_it",),
        "gamma": ("variants/test_kasa.py::test_the_loss_gets_the_regulariser_as_peft_gives_it",),
    },
    "LoftQConfig": {"loftq_bits": (LOFTQ,), "loftq_iter": (LOFTQ,)},
    "LoraGAConfig": {
        "direction": (
            LORA_GA,
            "calibration/test_loraga.py::test_every_direction_and_scale_of_peft_is_here",
        ),
        "scale": (
            LORA_GA,
            "calibration/test_loraga.py::test_every_direction_and_scale_of_peft_is_here",
        ),
        "stable_gamma": ("calibration/test_options.py::test_lora_gas_gamma_scales_as_pefts",),
    },
    "LoraRuntimeConfig": {
        "ephemeral_gpu_offload": (
            "variants/test_runtime.py::test_first_norms_are_computed_on_the_accelerator_on_request",
            "variants/test_runtime.py::test_the_values_are_pefts",
        )
    },
    "MontecloraConfig": {
        "num_samples": (MONTE,),
        "use_entropy": ("variants/test_monteclora.py::test_the_entropy_joins_the_loss_as_in_peft",),
        "dirichlet_prior": (
            "variants/test_monteclora.py::test_the_divergences_are_those_of_the_distributions",
        ),
        "sample_scaler": (
            "variants/test_monteclora.py::test_samples_lie_around_a_as_far_as_their_variance_says",
        ),
        "kl_loss_weight": (
            "variants/test_monteclora.py"
            "::test_peft_adds_a_term_of_the_dirichlets_divergence_that_is_to_be_subtracted",
        ),
        "buffer_size": (MONTE,),
    },
    "VeloraConfig": {
        "num_groups": ("variants/test_velora.py::test_gradients_in_training_agree",),
        "scale": ("variants/test_velora.py::test_gradients_in_training_agree",),
        "init_type": (
            "variants/test_velora.py::test_the_projection_follows_each_batch_or_the_first_or_none",
        ),
    },
}
"""Fields of the configs inside `LoraConfig`."""

LAYERS: dict[str, Tests] = {
    "Conv1d": (LORA,),
    "Conv2d": (LORA,),
    "Conv3d": (LORA,),
    "Embedding": (LORA,),
    "Linear": (LORA, "test_behaviour_parity.py::test_outputs_are_equal"),
    "LoraParallelLinear": (
        "bases/test_megatron.py::test_outputs_and_gradients_are_pefts_of_plain_layers",
    ),
    "MultiheadAttention": (
        "bases/test_attention.py::test_training_forward_and_gradients_are_pefts",
        "bases/test_attention.py::test_merged_weights_are_pefts",
    ),
    "ParamWrapper": ("bases/test_experts.py::test_outputs_and_gradients_are_pefts",),
}
"""Classes of layers in `peft.tuners.lora` that do not depend on a quantiser."""

RULES: dict[str, Tests] = dict.fromkeys(
    ("svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd",
     "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"),
    ("combine/test_against_peft.py::test_outputs_agree",
     "combine/test_against_peft.py::test_weights_of_either_sign_agree"),
)  # fmt: skip
"""Values of `combination_type`."""

FEATURES: dict[str, Tests] = {
    "add_adapter, set_adapter, delete_adapter": (
        "test_behaviour_parity.py::test_active_adapters_are_equal_through_a_lifetime",
    ),
    "adapter_names (mixed batches)": ("test_behaviour_parity.py::test_mixed_batches_are_equal",),
    "autocast_adapter_dtype": (
        "test_precision.py::test_dtypes_of_adapters_are_pefts_however_they_come",
    ),
    "convert_to_lora, save_as_lora": ("combine/test_convert.py::test_pairs_are_pefts",),
    "create_lorafa_optimizer": ("optimizers/test_lorafa.py::test_steps_are_pefts",),
    "create_loraplus_optimizer": ("optimizers/test_loraplus.py::test_steps_are_pefts",),
    "create_riemannian_optimizer": ("optimizers/test_riemannian.py::test_steps_are_pefts",),
    "disable_adapter": ("test_behaviour_parity.py::test_disabling_gives_both_the_base_output",),
    "disable_input_dtype_casting": (
        "test_helpers.py::test_inputs_are_cast_to_no_adapters_dtype_inside_and_outside",
        "test_precision.py::test_no_activation_is_ever_made_float32",
    ),
    "DoraCaching": ("test_helpers.py::test_norms_of_dora_are_kept_with_and_without_the_helper",),
    "find_kappa_target_modules": ("test_kappa.py::test_targets_are_pefts",),
    "get_layer_status, get_model_status": ("test_behaviour_parity.py::test_statuses_are_equal",),
    "hotswap_adapter": ("test_hotswap.py::test_outputs_are_pefts",),
    "inject_adapter_in_model": (
        "test_precision.py::test_injected_adapters_have_the_bases_dtype_as_in_peft",
        "test_tuner.py::test_injecting_by_a_state_dict_adapts_its_sites_and_leaves_their_values",
    ),
    "low_cpu_mem_usage": ("test_auto.py::test_tensors_may_be_made_on_the_meta_device",),
    "merge_adapter, unmerge_adapter, merge_and_unload": (
        "test_behaviour_parity.py::test_merged_models_are_equal",
        "weaknesses/test_t10_merged_state.py"
        "::test_t27_a_merge_is_computed_in_float32_and_rounded_once",
    ),
    "path_initial_model_for_weight_conversion": (
        "test_saving.py::test_conversion_writes_what_peft_writes",
    ),
    "PeftMixedModel": ("test_peft_mixed_model.py::test_methods_act_together_as_in_peft",),
    "reduce_intruder_dimension": ("combine/test_intruders.py::test_updates_are_pefts",),
    "replace_lora_weights_loftq": ("calibration/test_loftq.py::test_factors_are_pefts",),
    "rescale_adapter_scale": ("test_helpers.py::test_rescaled_outputs_are_pefts_and_come_back",),
    "safe_merge": (
        "storage/test_against_peft.py"
        "::test_a_safe_merge_that_fails_at_the_last_layer_has_written_nothing",
    ),
    "save_embedding_layers": ("test_embeddings.py::test_what_is_saved_is_what_peft_saves",),
    "save_pretrained, from_pretrained, load_adapter": (
        "test_checkpoint_parity.py::test_both_write_the_same_tensors",
        "test_checkpoint_parity.py::test_peft_loads_what_we_save",
        "test_checkpoint_parity.py::test_we_load_what_peft_saves",
    ),
    "set_scale, scale_layer, unscale_layer": (
        "test_helpers.py::test_scaling_layers_by_hand_is_pefts",
    ),
    "svd_rank, svd_clamp, density, majority_sign_method": (
        "combine/test_against_peft.py::test_a_rank_of_choice_agrees",
        "combine/test_against_peft.py::test_clamped_decompositions_agree",
        "combine/test_against_peft.py::test_signs_elected_by_number_agree",
    ),
}
"""What is done with LoRA adapters, by PEFT's names."""
