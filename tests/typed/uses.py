"""The public API as a user's typed script has it: read by type checkers, never run.

`mypy --strict` accepts every line of it, without a setting of this project's own. Every name of
`multigraft.__all__` is here. `mistakes.py` beside it holds what is to be refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import multigraft
from multigraft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    AdaLoraConfig,
    AdaptedLayer,
    AdaptionPromptConfig,
    ArrowConfig,
    AutoPeftModelForCausalLM,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    Extraction,
    HiraConfig,
    IA3Config,
    KasaConfig,
    LNTuningConfig,
    LoftQConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    MontecloraConfig,
    MultigraftError,
    OFTConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    TrainableTokensConfig,
    VeloraConfig,
    VeraConfig,
)


def configs() -> list[PeftConfig]:
    """One of each method, its options as keywords."""
    names = ["q_proj", "v_proj"]
    return [
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM),
        LoraConfig(target_modules=names, rank_pattern={"v_proj": 4}, use_dora=True, bias="none"),
        LoraConfig(eva_config=EvaConfig(rho=2.0), init_lora_weights="eva"),
        LoraConfig(corda_config=CordaConfig(corda_method="kpm"), init_lora_weights="corda"),
        LoraConfig(lora_ga_config=LoraGAConfig(scale="stable"), init_lora_weights="lora_ga"),
        LoraConfig(loftq_config=LoftQConfig(loftq_bits=4), init_lora_weights="loftq"),
        LoraConfig(use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2)),
        LoraConfig(kasa_config=KasaConfig(beta=1e-4), runtime_config=LoraRuntimeConfig()),
        LoraConfig(velora_config=VeloraConfig(num_groups=4), target_modules=names),
        LoraConfig(monteclora_config=MontecloraConfig(num_samples=4), target_modules=names),
        AdaLoraConfig(target_modules=names, init_r=12, target_r=8, total_step=100),
        HiraConfig(r=8, target_modules=names),
        IA3Config(target_modules=names, feedforward_modules=[]),
        LNTuningConfig(target_modules=["norm"]),
        LoHaConfig(r=4, target_modules=names),
        LoKrConfig(r=4, target_modules=names),
        OFTConfig(oft_block_size=8, target_modules=names),
        TrainableTokensConfig(token_indices=[1, 2]),
        VeraConfig(r=64, target_modules=names),
        PromptTuningConfig(num_virtual_tokens=8, prompt_tuning_init=PromptTuningInit.RANDOM),
        PromptEncoderConfig(
            num_virtual_tokens=8,
            encoder_reparameterization_type=PromptEncoderReparameterizationType.MLP,
        ),
        PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
        AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
    ]


def lifecycle(base: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    """Adapters side by side, from attaching to taking them off."""
    model = multigraft.get_peft_model(base, LoraConfig(r=4), adapter_name="first")
    assert_type(model, PeftModel)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    model.set_adapter(["first", "second"], inference_mode=True)
    assert_type(model.active_adapters, list[str])
    assert_type(model.peft_config, dict[str, PeftConfig])
    assert_type(model.get_nb_trainable_parameters(), tuple[int, int])

    with model.disable_adapter():
        model(**batch)
    rows = ["first", ["first", "second"], "__base__"]
    model(**batch, adapter_names=rows)
    model.generate(**batch, adapter_names=rows, max_new_tokens=4)
    with model.mixed_batch(rows):
        model(**batch)

    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", "svd", svd_rank=4)
    model.set_requires_grad(["first"], False)
    model.merge_adapter(["first", "second"], safe_merge=True)
    model.unmerge_adapter()

    tuner = model.base_model
    tuner.merge_adapter(["first"], keep_original=False)
    tuner.unmerge_adapter()
    for layer in tuner.layers():
        assert_type(layer, AdaptedLayer)
    model.delete_adapter("second")
    assert_type(model.get_base_model(), nn.Module)
    return model.unload()


def files(base: nn.Module, folder: Path) -> PeftModel:
    """Saving and loading, as files and as state dicts."""
    model = PeftModel.from_pretrained(base, folder, "style", is_trainable=True)
    report = model.load_adapter(str(folder), "other", strict=False)
    print(report)
    model.save_pretrained(folder, selected_adapters=["style"])
    state = multigraft.get_peft_model_state_dict(model, adapter_name="style")
    assert_type(state, dict[str, Tensor])
    multigraft.set_peft_model_state_dict(model, state, "style")
    assert_type(multigraft.load_peft_weights(folder, device="cpu"), dict[str, Tensor])
    whole = multigraft.get_base_model_state_dict(model)
    multigraft.set_base_model_state_dict(model, whole, strict=True)
    assert_type(PeftConfig.from_pretrained(folder), PeftConfig)
    assert_type(multigraft.get_peft_config({"peft_type": "LORA"}), PeftConfig)
    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=False)


def autos(folder: str) -> list[PeftModel]:
    """Every class that loads an adapter together with its base."""
    kinds = [
        multigraft.AutoPeftModel,
        multigraft.AutoPeftModelForFeatureExtraction,
        multigraft.AutoPeftModelForQuestionAnswering,
        multigraft.AutoPeftModelForSeq2SeqLM,
        multigraft.AutoPeftModelForSequenceClassification,
        multigraft.AutoPeftModelForTokenClassification,
    ]
    return [kind.from_pretrained(folder) for kind in kinds]


def handles(base: nn.Module, config: LoraConfig) -> list[nn.Module]:
    """The classes that a script may name."""
    model = PeftModelForCausalLM(base, config, adapter_name="a")
    mixed: type[PeftModel] = PeftMixedModel
    tasks: list[type[PeftModel]] = [
        mixed,
        multigraft.PeftModelForFeatureExtraction,
        multigraft.PeftModelForQuestionAnswering,
        multigraft.PeftModelForSeq2SeqLM,
        multigraft.PeftModelForSequenceClassification,
        multigraft.PeftModelForTokenClassification,
    ]
    tuners = [
        multigraft.AdaLoraModel,
        multigraft.AdaptionPromptModel,
        multigraft.HiraModel,
        multigraft.IA3Model,
        multigraft.LNTuningModel,
        multigraft.LoHaModel,
        multigraft.LoKrModel,
        multigraft.OFTModel,
        multigraft.TrainableTokensModel,
        multigraft.VeraModel,
    ]
    one = LoraModel(base, {"a": config}, adapter_name="a")
    plain = multigraft.inject_adapter_in_model(config, base, "b")
    return [model, one, plain, *(kind(base, config) for kind in tasks), tuners[0](base, config)]


def is_ours(layer: nn.Module) -> bool:
    """The questions that other packages ask of a layer."""
    kinds = (multigraft.BaseTunerLayer, multigraft.LoraLayer, AdaptedLayer)
    return isinstance(layer, kinds)


def tables() -> list[object]:
    """PEFT's tables of classes."""
    assert_type(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA], type[PeftConfig])
    prompts: type[PeftConfig] = multigraft.PromptLearningConfig
    return [
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"],
        PEFT_TYPE_TO_TUNER_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        prompts,
        multigraft.__version__.split("."),
    ]


def looking(model: nn.Module, folder: Path) -> bool:
    """What is there, and whether it is sound."""
    structure = multigraft.inspect(model)
    print(structure, len(structure.sites), multigraft.targets(model, LoraConfig()))
    for status in multigraft.get_layer_status(model):
        assert_type(status.name, str)
    print(multigraft.get_model_status(model).adapter_model_type, multigraft.diff(folder, folder))
    diagnosis = multigraft.doctor(folder, fix=True)
    print(diagnosis)
    return multigraft.verify(model).is_clean


def combining(model: PeftModel, tuned: nn.Module) -> Extraction:
    """One adapter out of others, or of something else."""
    config, state = multigraft.convert_to_lora(model, 8, adapter_name="loha")
    assert_type(config, LoraConfig)
    assert_type(state, dict[str, Tensor])
    multigraft.save_as_lora("folder", model, 0.95)
    return multigraft.extract_lora(model.get_base_model(), tuned, 0.9)


def beginning(base: nn.Module, data: Iterable[dict[str, Tensor]]) -> nn.Module:
    """Bases made ready, and initialisations that look at data."""
    base = multigraft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    multigraft.cast_mixed_precision_params(base, torch.bfloat16)
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig())

    def step() -> None:
        base.zero_grad()

    multigraft.preprocess_corda(base, config, run_model=step)
    multigraft.preprocess_loraga(base, config, step)
    model = multigraft.get_peft_model(base, config)
    state = multigraft.get_eva_state_dict(model, data)
    multigraft.initialize_lora_eva_weights(model, data, state)
    multigraft.replace_lora_weights_loftq(model, "folder")
    print(multigraft.find_kappa_target_modules(base, top_p=0.2)["target_modules"])
    return multigraft.create_arrow_model(base, ["a", "b"], ArrowConfig(top_k=2))


def prompts(model: PeftModel, tokenizer: object, cache: object, ids: Tensor) -> list[Tensor]:
    """Prefixes that begin at a text or at a cache, and what makes prompts in training."""
    modules: list[nn.Module] = [
        multigraft.PrefixEncoder(PrefixTuningConfig()),
        multigraft.PromptEncoder(PromptEncoderConfig()),
        multigraft.PromptEmbedding(PromptTuningConfig(), nn.Embedding(4, 4)),
    ]
    print(modules)
    return [
        multigraft.initialize_kv_prefix_from_text(model, tokenizer, text="You are brief."),
        multigraft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache),
        multigraft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4),
        multigraft.shift_tokens_right(ids, 0, 1),
    ]


def errors(model: PeftModel) -> str:
    """Each error is one of ours, and the built-in one that suits it."""
    wrong: tuple[type[ValueError], ...] = (
        multigraft.AdapterNameError,
        multigraft.ConfigError,
        multigraft.DataError,
        multigraft.MergeError,
        multigraft.NestingError,
        multigraft.RoutingError,
        multigraft.SourceError,
        multigraft.TargetError,
        multigraft.NoMatchingPeftModuleError,
        multigraft.UnsupportedError,
    )
    late: tuple[type[RuntimeError], ...] = (
        multigraft.CheckpointError,
        multigraft.StateError,
        multigraft.TrainingError,
    )
    absent: tuple[type[ImportError], ...] = (multigraft.MissingExtraError, multigraft.AliasError)
    warned: tuple[type[Warning], ...] = (multigraft.MultigraftWarning, multigraft.PeftWarning)
    try:
        model.set_adapter("nobody")
    except (*wrong, *late, *absent) as error:
        return f"{error}, {warned}"
    except (MultigraftError, multigraft.PeftError) as error:
        return str(error)
    return ""
