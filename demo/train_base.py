"""Train the demo base model, from the standard library's text to a folder that loads offline.

    python demo/train_base.py --output src/multigraft/demo/model

Steps: collect text, train the tokenizer on it, tokenise, train a small Llama, save it with its
model card. Nothing is downloaded. A GPU takes minutes; a CPU does the same in many hours, or
with fewer `--steps` to try the script out. `demo/README.md` records the run that was shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the pool below forks

import numpy as np
import torch
from base_skills import document
from base_text import python_words, stdlib_documents
from model_card import card
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from multigraft.demo.tasks import split_of

END, PAD = "<|endoftext|>", "<|pad|>"
END_ID, PAD_ID = 0, 1

# Splits identifiers at case changes and underscores, and numbers into digits, so that a
# notation can be rewritten token by token.
WORDS = r"\n+| ?[A-Z]+(?![a-z])| ?[A-Z]?[a-z]+|\d| ?[^\sA-Za-z\d_]+|_+|[^\S\n]+(?=[^\S\n])|[^\S\n]+"

# Renders one user message exactly as `multigraft.demo.tasks.PROMPT`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Output:\n{{ message['content'] }}" + END + "\n"
    "{% else %}Input: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Output:\n{% endif %}"
)

SHARES = {"source": 0.28, "prose": 0.10, "skills": 0.62}  # of the training sequences
SHARD = 5_000  # generated documents made by one job


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=1792)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--feed-forward", type=int, default=704)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-value-heads", type=int, default=2)
    parser.add_argument("--documents", type=int, default=600_000, help="generated documents")
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--batch", type=int, default=256, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


# --- text and tokens -----------------------------------------------------------------------


@dataclass
class Texts:
    """The documents of the standard library: training ones by kind, and the held-out ones."""

    train: dict[str, list[str]]
    heldout: list[str]

    @classmethod
    def collect(cls) -> Texts:
        """Read them. Whole files are held out, with their docstrings."""
        texts = cls({"source": [], "prose": []}, [])
        for name, kind, text in stdlib_documents():
            (texts.heldout if split_of(name) == "heldout" else texts.train[kind]).append(text)
        return texts


def skill_documents(seed: str, count: int, pool: list[str]) -> list[str]:
    """`count` generated documents."""
    rng = random.Random(seed)
    return [document(rng, pool) for _ in range(count)]


def train_tokenizer(texts: Texts, pool: list[str], args: argparse.Namespace) -> Tokenizer:
    """A byte-level BPE tokenizer, learned from library and generated text, about 1 to 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = texts.train["source"][::2] + texts.train["prose"]
    skills = skill_documents(f"{args.seed}/tokenizer", 50_000, pool)
    tokenizer.train_from_iterator(library + skills, trainer)
    return tokenizer


@dataclass
class Stream:
    """Tokens of many documents, each closed by the end token, and where documents begin."""

    tokens: torch.Tensor  # (tokens,)
    starts: torch.Tensor  # (documents,)

    @classmethod
    def of(cls, lists: list[np.ndarray], device: str) -> Stream:
        """Join the documents' token arrays."""
        tokens = np.concatenate(lists)
        starts = np.flatnonzero(tokens[:-1] == END_ID) + 1
        return cls(torch.from_numpy(tokens).to(device), torch.from_numpy(starts).to(device))


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """(tokens,) of the documents, each closed by the end token."""
    encoded = tokenizer.encode_batch(documents)
    return np.concatenate([np.array([*one.ids, END_ID], dtype=np.int16) for one in encoded])


def encode_shard(job: tuple[str, str, int, list[str]]) -> np.ndarray:
    """Generate and tokenise one shard, in a worker process."""
    tokenizer_json, seed, count, pool = job
    return encode(Tokenizer.from_str(tokenizer_json), skill_documents(seed, count, pool))


def encode_text(job: tuple[str, list[str]]) -> np.ndarray:
    """Tokenise library documents, in a worker process."""
    return encode(Tokenizer.from_str(job[0]), job[1])


def make_streams(
    texts: Texts, pool: list[str], tokenizer: Tokenizer, args: argparse.Namespace
) -> dict[str, Stream]:
    """The training streams by kind, and the two to measure on: "heldout" and "new skills"."""
    as_json = tokenizer.to_str()
    shards = max(1, args.documents // SHARD)
    skills = [(as_json, f"{args.seed}/{i}", SHARD, pool) for i in range(shards)]
    skills.append((as_json, f"{args.seed}/new", 1_000, pool))
    library = {**texts.train, "heldout": texts.heldout}
    with ProcessPoolExecutor(args.workers) as workers:
        *made, new = workers.map(encode_shard, skills)
        streams = {
            "skills": Stream.of(made, args.device),
            "new skills": Stream.of([new], args.device),
        }
        for kind, documents in library.items():
            parts = [(as_json, documents[i::16]) for i in range(16)]
            streams[kind] = Stream.of(list(workers.map(encode_text, parts)), args.device)
    return streams


# --- training ------------------------------------------------------------------------------


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """The untrained model. Heads are untied, so that adapting one end leaves the other alone."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.feed_forward,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def draw_batch(
    streams: dict[str, Stream], rng: np.random.Generator, args: argparse.Namespace
) -> torch.Tensor:
    """(batch, length) tokens: `SHARES` of each kind; generated documents from their beginning."""
    rows = []
    for kind, count in zip(SHARES, rng.multinomial(args.batch, list(SHARES.values())), strict=True):
        stream = streams[kind]
        drawn = torch.from_numpy(rng.random(count)).to(args.device)
        if kind == "skills":
            first = stream.starts[(drawn * len(stream.starts)).long()]
        else:
            first = (drawn * len(stream.tokens)).long()
        first = first.clamp(max=len(stream.tokens) - args.length)
        rows.append(first[:, None] + torch.arange(args.length, device=args.device))
        rows[-1] = stream.tokens[rows[-1]]
    return torch.cat(rows).long()


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of (batch, length) tokens, in nats."""
    # bfloat16 halves a GPU's work; on a CPU without it, it would only be slower.
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
    )


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine to 2 % of the peak."""
    warm = max(1, args.steps * 3 // 100)
    if step < warm:
        return args.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, args.steps - warm)
    return args.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def train(model: LlamaForCausalLM, streams: dict[str, Stream], args: argparse.Namespace) -> None:
    """AdamW on the whole model, in place."""
    rng = np.random.default_rng(args.seed)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=args.device != "cpu",
    )
    started = time.time()
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = loss_of(model, draw_batch(streams, rng, args))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == args.steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - started:.0f} s", flush=True)


@torch.no_grad()
def measure(model: LlamaForCausalLM, stream: Stream, length: int) -> float:
    """Mean loss over a whole stream, cut into sequences of `length` tokens."""
    model.eval()
    whole = len(stream.tokens) // length * length
    parts = stream.tokens[:whole].long().view(-1, length).split(64)
    return sum(loss_of(model, part).item() * len(part) for part in parts) / (whole // length)


# --- the folder ----------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in bfloat16 (half the size), everything else as transformers expects it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    # Stored small, loaded in float32 unless asked otherwise: a CPU trains faster in it.
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    GenerationConfig(
        bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=PAD_ID, max_new_tokens=64
    ).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Run all steps and print what the model card records."""
    args = arguments()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    started = time.time()
    texts = Texts.collect()
    pool = python_words(texts.train["source"])
    tokenizer = train_tokenizer(texts, pool, args)
    streams = make_streams(texts, pool, tokenizer, args)
    sizes = {kind: len(stream.tokens) for kind, stream in streams.items()}
    print(f"tokens {sizes}  {time.time() - started:.0f} s", flush=True)

    model = make_model(args).to(args.device)
    train(model, streams, args)
    save(model, tokenizer, args.output)
    # What is measured is what is shipped: the weights after rounding.
    shipped = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32).to(args.device)
    losses = {
        kind: measure(shipped, streams[kind], args.length) for kind in ("heldout", "new skills")
    }
    facts = {
        "command": shlex.join(["python", "demo/train_base.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "minutes": (time.time() - started) / 60,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": (args.output / "model.safetensors").stat().st_size,
        "heldout_characters": sum(map(len, texts.heldout)),
    }
    (args.output / "README.md").write_text(card(args, facts, sizes, losses))
    print(json.dumps({**facts, **losses}, indent=1))


if __name__ == "__main__":
    main()
