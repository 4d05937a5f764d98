"""transformers' own methods for adapters, on a small model."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import torch
from facts import apart, fill, tell, trained
from peft import LoraConfig, PeftType
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.utils.import_utils import is_peft_available

FOLDER = tempfile.mkdtemp()
IDS = torch.arange(6)[None]


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def config(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def added(found: dict[str, Any]) -> Tensor:
    """add_adapter, set_adapter, enable and disable, save, delete."""
    model = AutoModelForCausalLM.from_pretrained(f"{FOLDER}/base").eval()
    base = logits(model)
    model.add_adapter(config())
    fill(model, "default", 1)
    one = logits(model)
    found["it acts"] = apart(one, base) > 0
    model.save_pretrained(f"{FOLDER}/adapter")
    found["files"] = sorted(os.listdir(f"{FOLDER}/adapter"))
    found["keys"] = sorted(load_file(f"{FOLDER}/adapter/adapter_model.safetensors"))
    model.disable_adapters()
    found["disabled"] = apart(logits(model), base)
    model.enable_adapters()
    found["enabled"] = apart(logits(model), one)
    model.add_adapter(config(r=2, target_modules=["q_proj", "o_proj"]), "two")
    fill(model, "two", 2)
    found["the new one is active"] = model.active_adapters()
    found["the new one trains"] = trained(model)
    model.set_adapter(["default", "two"])
    found["both"] = model.active_adapters(), apart(logits(model), one) > 0
    model.set_adapter("default")
    found["the first again"] = apart(logits(model), one), trained(model)
    found["state"] = sorted(model.get_adapter_state_dict("two"))
    model.delete_adapter("two")
    found["one is left"] = list(model.peft_config), apart(logits(model), one)
    model.delete_adapter("default")
    found["none is left"] = hasattr(model, "peft_config"), model._hf_peft_config_loaded
    found["the base again"] = apart(logits(model), base)
    return one


def loaded(found: dict[str, Any], one: Tensor) -> None:
    """load_adapter from a folder and from tensors, hot-swapping, from_pretrained of an adapter."""
    folder = f"{FOLDER}/adapter"
    model = tiny()
    info = model.load_adapter(folder)
    found["load report"] = type(info).__name__, sorted(info.missing_keys | info.unexpected_keys)
    found["loaded"] = apart(logits(model), one), trained(model)
    info = model.load_adapter(folder, adapter_name="again", is_trainable=True)
    found["second load report"] = type(info).__name__
    found["loaded beside"] = list(model.peft_config), apart(logits(model), one), trained(model)
    model.set_adapter("default")
    found["the first was kept"] = apart(logits(model), one)
    state = load_file(f"{folder}/adapter_model.safetensors")
    model = tiny()
    model.load_adapter(peft_config=config(), adapter_state_dict=state, adapter_name="tensors")
    found["from tensors"] = apart(logits(model), one)
    fill(model, "tensors", 7)
    found["changed"] = apart(logits(model), one) > 0
    model.load_adapter(folder, adapter_name="tensors", hotswap=True)
    found["swapped in"] = apart(logits(model), one)
    path = f"{folder}/adapter_config.json"
    with open(path) as file:
        values = json.load(file)
    with open(path, "w") as file:
        json.dump({**values, "base_model_name_or_path": f"{FOLDER}/base"}, file)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found["from_pretrained"] = apart(logits(model), one), model._hf_peft_config_loaded
    found["its kind"] = model.peft_config["default"].peft_type == PeftType.LORA


def beside(found: dict[str, Any]) -> None:
    """A saved module, DoRA and single tokens through transformers' loader."""
    for name, options in {
        "saved module": {"modules_to_save": ["lm_head"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2, 3]}},
    }.items():
        model = tiny()
        model.add_adapter(config(**options))
        fill(model, "default", 3)
        model.save_pretrained(f"{FOLDER}/{name}")
        again = tiny()
        report = again.load_adapter(f"{FOLDER}/{name}")
        found[name] = apart(logits(again), logits(model)), sorted(report.missing_keys)
        found[f"{name}: acts"] = apart(logits(model), logits(tiny())) > 0


def best(found: dict[str, Any]) -> None:
    """The best checkpoint's adapter is loaded at the end, and training goes on from the last."""

    def trainer(steps: int) -> Trainer:
        model = tiny()
        model.add_adapter(config())
        rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(8)]
        arguments = TrainingArguments(
            f"{FOLDER}/best",
            max_steps=steps,
            save_steps=1,
            eval_steps=1,
            eval_strategy="steps",
            load_best_model_at_end=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

    trainer(2).train()
    more = trainer(3)
    more.train(resume_from_checkpoint=True)
    found["beyond PEFT: steps"] = more.state.global_step


def fitted(found: dict[str, Any]) -> None:
    """A model with an adapter in place goes into the trainer."""
    model = tiny()
    model.add_adapter(config())
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(8)]
    arguments = TrainingArguments(
        f"{FOLDER}/run",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    names = sorted(os.listdir(f"{FOLDER}/run/checkpoint-2"))
    found["checkpoint"] = [n for n in names if n.startswith(("adapter", "model", "config"))]
    found["trained"] = apart(logits(model), logits(tiny())) > 0


if __name__ == "__main__":
    facts: dict[str, Any] = {"transformers sees PEFT": is_peft_available()}
    tiny().save_pretrained(f"{FOLDER}/base")
    one = added(facts)
    loaded(facts, one)
    beside(facts)
    fitted(facts)
    try:
        best(facts)
    except FileNotFoundError as error:
        facts["beyond PEFT: steps"] = os.path.basename(str(error.filename))
    tell(facts)
