"""Tiny encoders and encoder-decoders on disk, with a tokeniser of words, and data for each task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multigraft import LoraConfig, PeftModel
from multigraft.train import load_tokenizer, pad_token
from multigraft.train.load import attach
from multigraft.train.tasks import Task, task_of
from tests.tiny_base import write_base

GOOD, BAD = ("fine", "lovely", "great", "bright"), ("awful", "grim", "dull", "poor")
NAMES, PLACES = ("ada", "bob", "eve", "kim"), ("rome", "oslo", "bonn", "lima")
FILLERS = ("the", "film", "was", "and", "a", "day", "in", "sang", "went", "to")
WORDS = (*GOOD, *BAD, *NAMES, *PLACES, *FILLERS)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_tokenizer(folder: Path) -> None:
    """One token a word, with a token before each text and one after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def write_bert(folder: Path) -> Path:
    """An encoder as pre-training leaves it: it has neither head nor pooler."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_t5(folder: Path) -> Path:
    """An encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


WRITERS = {"bert": write_bert, "t5": write_t5, "llama": write_base}


def opinions(count: int) -> list[dict[str, Any]]:
    return [
        {
            "text": f"the film was {(GOOD, BAD)[n % 2][n // 2 % 4]}{' and a day' * (n % 3)}",
            "label": ("good", "bad")[n % 2],
        }
        for n in range(count)
    ]


def qualities(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        words = [GOOD[n // 4 % 4]] * (n % 2) + [BAD[n % 4]] * (n // 2 % 2)
        labels = ["good"] * (n % 2) + ["bad"] * (n // 2 % 2)
        rows.append({"text": " ".join(["the", "film", *words, "day"]), "labels": labels})
    return rows


def degrees(count: int) -> list[dict[str, Any]]:
    return [
        {"text": " ".join(["the", *[GOOD[n % 4]] * (n % 4), "film"]), "label": n % 4 / 2}
        for n in range(count)
    ]


def entailed(count: int) -> list[dict[str, Any]]:
    return [
        {"text": GOOD[n % 4], "text_pair": f"a {GOOD[(n + n // 4 % 2) % 4]}", "label": n // 4 % 2}
        for n in range(count)
    ]


def travels(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        tokens = [NAMES[n % 4], "went", "to", PLACES[n // 4 % 4], *["and", "sang"] * (n % 2)]
        tags = ["B-PER", "O", "O", "B-LOC", *["O", "O"] * (n % 2)]
        rows.append({"tokens": tokens, "tags": tags})
    return rows


def opposites(count: int) -> list[dict[str, Any]]:
    return [
        {
            "source": f"the film was {GOOD[n % 4]}{' day' * (n // 4 % 2)}",
            "target": f"{BAD[n % 4]}{' and' * (n // 4 % 2)}",
        }
        for n in range(count)
    ]


def twins(count: int) -> list[dict[str, Any]]:
    """Two words that belong together; every third has a negative."""
    left, right = (*GOOD, *NAMES), (*BAD, *PLACES)
    rows = []
    for n in range(count):
        row = {"anchor": f"the {left[n % 8]}", "positive": f"{right[n % 8]}{' in' * (n % 2)}"}
        rows.append({**row, "negative": right[(n + 1) % 8]} if n % 3 == 0 else row)
    return rows


def likenesses(count: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence1": f"the {GOOD[n % 4]}",
            "sentence2": f"{(GOOD, BAD)[n // 4 % 2][n % 4]} day",
            "score": (0.9, -0.4)[n // 4 % 2] - n % 4 / 8,
        }
        for n in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {n}:", "chosen": f" yes {n}", "rejected": f" no{' no' * (n % 3)}"}
        for n in range(count)
    ]


def completions(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {n}:", "completion": f" {'yes ' * (n % 3)}{n}"} for n in range(count)]


@dataclass(frozen=True)
class Subject:
    """A task on a base, with data that it can learn.

    Args:
        measure: what rises when it learns.
        reached: by training, and not before.
    """

    name: str
    task: Any
    base: str
    rows: Any
    measure: str | None = None
    reached: float = 0.9
    steps: int = 60


SUBJECTS = [
    Subject("causal-lm", "causal-lm", "llama", completions),
    Subject("one class", "seq-cls", "bert", opinions, "accuracy"),
    Subject("one class, decoder", "seq-cls", "llama", opinions, "accuracy"),
    Subject("pairs", "seq-cls", "bert", entailed, "f1"),
    Subject("several classes", "seq-cls", "bert", qualities, "f1"),
    Subject("values", "seq-cls", "bert", degrees, "spearman"),
    Subject("tags", "token-cls", "bert", travels, "entity_f1"),
    Subject("seq2seq", "seq2seq", "t5", opposites, "exact_match", steps=120),
    Subject("embeddings", "embed", "bert", twins, "accuracy_at_1"),
    Subject("scored", "embed", "bert", likenesses, "spearman"),
    Subject(
        "embeddings, decoder", {"name": "embed", "pooling": "last"}, "llama", twins, "accuracy_at_1"
    ),
    Subject("dpo", "dpo", "llama", preferences, "reward_accuracy", 1.0),
    Subject("ipo", {"name": "dpo", "loss": "ipo"}, "llama", preferences, "reward_accuracy", 1.0),
]


def records_for(task: Task, rows: list[dict[str, Any]]) -> list[Any]:
    from multigraft.train.formats import read_row

    return [read_row(row, n, kinds=task.records) for n, row in enumerate(rows, start=1)]


class Setting:
    """A task, settled, its base loaded, its tokeniser, and its examples.

    Args:
        count: of examples.
    """

    def __init__(self, subject: Subject, folder: Path, count: int = 32) -> None:
        self.folder = str(folder)
        self.tokenizer = load_tokenizer(folder)
        self.pad = pad_token(self.tokenizer)
        task = task_of(subject.task)
        records = records_for(task, subject.rows(count))
        self.task = task.settled(records)
        self.base = self.task.load(self.folder, device="cpu")
        self.examples = [
            piece for record in records for piece in self.task.pieces(record, self.tokenizer, 48)[0]
        ]

    def batch(self, start: int, stop: int) -> Any:
        return self.task.collate(self.examples[start:stop], self.pad)

    def grown(self, *names: str, exact: bool = False, **config: Any) -> PeftModel:
        """The base with adapters of these names, of ranks 2, 3, …; in float64 where ``exact``."""
        model = self.base.double() if exact else self.base
        for rank, name in enumerate(names, start=2):
            config = {"r": rank, "target_modules": "all-linear", **config}
            kind = self.task.task_type
            model = attach(model, LoraConfig(**config), name, seed=rank, task_type=kind)
            config.pop("r")
        return model.double() if exact else model

    def loss(self, model: PeftModel, batch: Any, **routed: Any) -> tuple[Any, Any]:
        """The losses by row, and the prepared batch."""
        batch = self.task.prepare(model, batch)
        outputs = model(**batch.inputs, **self.task.call, **routed)
        return self.task.losses(outputs, batch), batch
