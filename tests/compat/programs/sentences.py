"""sentence-transformers' adapters, on a small model."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import torch
from datasets import Dataset
from facts import apart, fill, tell
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

FOLDER = tempfile.mkdtemp()
BASE = f"{FOLDER}/base"


def write_base() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    with open(f"{FOLDER}/vocab.txt", "w") as file:
        file.write("\n".join(words))
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 25,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).save_pretrained(BASE)
    BertTokenizerFast(f"{FOLDER}/vocab.txt").save_pretrained(BASE)


def model(path: str = BASE) -> SentenceTransformer:
    return SentenceTransformer(path, device="cpu")


def vectors(encoder: SentenceTransformer) -> Tensor:
    return torch.tensor(encoder.encode(["w1 w2", "w3"]))


def fit(encoder: SentenceTransformer) -> None:
    rows = Dataset.from_list([{"anchor": f"w{i}", "positive": f"w{i + 1}"} for i in range(8)])
    arguments = SentenceTransformerTrainingArguments(
        f"{FOLDER}/run",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = losses.MultipleNegativesRankingLoss(encoder)
    SentenceTransformerTrainer(encoder, args=arguments, train_dataset=rows, loss=loss).train()


def adapted(found: dict[str, Any]) -> None:
    encoder = model()
    base = vectors(encoder)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    encoder.add_adapter(config)
    fill(encoder, "default", 1)
    found["active"] = encoder.active_adapters()
    before = vectors(encoder)
    found["it acts"] = apart(before, base) > 0
    encoder.disable_adapters()
    found["disabled"] = apart(vectors(encoder), base)
    encoder.enable_adapters()
    found["enabled"] = apart(vectors(encoder), before)
    fit(encoder)
    after = vectors(encoder)
    found["it trains"] = apart(after, before) > 0
    checkpoint = os.listdir(f"{FOLDER}/run/checkpoint-2")
    found["checkpoint"] = sorted(n for n in checkpoint if n.startswith(("adapter", "model.")))
    encoder.save_pretrained(f"{FOLDER}/saved")
    with open(f"{FOLDER}/saved/adapter_config.json") as file:
        found["its base"] = json.load(file)["base_model_name_or_path"] == BASE
    found["opened"] = apart(vectors(model(f"{FOLDER}/saved")), after)
    other = model()
    other.load_adapter(f"{FOLDER}/saved")
    found["loaded"] = apart(vectors(other), after)
    found["state"] = sorted(other.get_adapter_state_dict())
    other.delete_adapter("default")
    found["deleted"] = apart(vectors(other), base)


if __name__ == "__main__":
    facts: dict[str, Any] = {}
    write_base()
    adapted(facts)
    tell(facts)
