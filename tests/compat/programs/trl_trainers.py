"""TRL's trainers with a `peft_config`, on a small model."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from datasets import Dataset
from facts import apart, tell
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

FOLDER = tempfile.mkdtemp()
WORDS = [f"w{i}" for i in range(40)]
OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_length": 16,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
TEXTS = Dataset.from_list([{"text": " ".join(WORDS[i : i + 6])} for i in range(8)])
PAIRS = Dataset.from_list(
    [
        {"prompt": " ".join(WORDS[i : i + 3]), "chosen": WORDS[i + 3], "rejected": WORDS[i + 9]}
        for i in range(8)
    ]
)


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    split = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=split, **names)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 44}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2))


def config(**options: Any) -> LoraConfig:
    targets = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **targets)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 12)[None]).logits


def adapter_files(folder: str) -> list[str]:
    return sorted(f for f in os.listdir(folder) if f.startswith(("adapter", "model", "pytorch")))


def first_loss(trainer: Any) -> float:
    return round(next(each["loss"] for each in trainer.state.log_history if "loss" in each), 4)


def sft(found: dict[str, Any]) -> None:
    def trainer(**options: Any) -> SFTTrainer:
        arguments = SFTConfig(f"{FOLDER}/sft", **{**OPTIONS, **options})
        data = {"train_dataset": TEXTS, "eval_dataset": TEXTS, "processing_class": tokenizer()}
        return SFTTrainer(tiny(), args=arguments, peft_config=config(), **data)

    first = trainer(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    found["sft: model"] = type(first.model).__name__
    first.train()
    found["sft: first loss"] = first_loss(first)
    found["sft: checkpoint"] = adapter_files(f"{FOLDER}/sft/checkpoint-3")
    first.save_model(f"{FOLDER}/final")
    again = PeftModel.from_pretrained(tiny(), f"{FOLDER}/final")
    found["sft: reloaded"] = apart(outputs(again), outputs(first.model))
    found["sft: learned"] = apart(outputs(again), outputs(tiny())) > 0
    more = trainer(max_steps=4)
    more.train(resume_from_checkpoint=True)
    found["sft: resumed"] = more.state.global_step


def dpo(found: dict[str, Any]) -> None:
    def trainer(model: Any, folder: str, **options: Any) -> DPOTrainer:
        arguments = DPOConfig(f"{FOLDER}/{folder}", **OPTIONS)
        data = {"train_dataset": PAIRS, "processing_class": tokenizer()}
        return DPOTrainer(model, args=arguments, **data, **options)

    fresh = trainer(tiny(), "dpo", peft_config=config())
    found["dpo: reference is the base"] = fresh.ref_model is None
    fresh.train()
    found["dpo: first loss"] = first_loss(fresh)
    found["dpo: checkpoint"] = adapter_files(f"{FOLDER}/dpo/checkpoint-3")
    model = PeftModel.from_pretrained(tiny(), f"{FOLDER}/final", is_trainable=True)
    before = outputs(model)
    more = trainer(model, "dpo-more")
    found["dpo: adapters"] = list(model.peft_config)
    more.train()
    names = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    found["dpo: trained"] = sorted(names), apart(outputs(model), before) > 0
    model.set_adapter("ref")
    found["dpo: the reference stayed"] = apart(outputs(model), before)


def refused(found: dict[str, Any]) -> None:
    wrong = {"a dictionary": {"r": 4}, "the head": config(target_modules=["lm_head"])}
    for what, given in wrong.items():
        arguments = SFTConfig(f"{FOLDER}/x", **OPTIONS)
        data = {"train_dataset": TEXTS, "processing_class": tokenizer()}
        try:
            SFTTrainer(tiny(), args=arguments, peft_config=given, **data)
        except (TypeError, ValueError) as error:
            found[f"refused: {what}"] = f"{type(error).__name__}: {error}"[:60]


if __name__ == "__main__":
    facts: dict[str, Any] = {}
    sft(facts)
    dpo(facts)
    refused(facts)
    tell(facts)
