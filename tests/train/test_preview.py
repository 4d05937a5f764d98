"""The preview of every task: what stands there, what of it is learned, and how much."""

from __future__ import annotations

import pytest

from multigraft.train import load_tokenizer, preview
from tests.tiny_base import write_lines
from tests.train.tasks import bases
from tests.train.tasks.bases import WRITERS


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        kind: load_tokenizer(WRITERS[kind](tmp_path_factory.mktemp(kind)))
        for kind in ("bert", "llama")
    }


CASES = [
    ("causal-lm", "llama", bases.completions, "Say 0:⟦ 0<|endoftext|>⟧", 3, "tokens"),
    ("seq-cls", "bert", bases.opinions, "[CLS] the film was fine [SEP] → ⟦good⟧", 1, "labels"),
    ("seq-cls", "bert", bases.qualities, "[CLS] the film day [SEP] → ⟦none⟧", 2, "labels"),
    ("seq-cls", "bert", bases.degrees, "[CLS] the film [SEP] → ⟦0⟧", 1, "labels"),
    (
        "token-cls",
        "bert",
        bases.travels,
        "[CLS] ada ⟦/B-PER⟧ went ⟦/O⟧ to ⟦/O⟧ rome [SEP] ⟦/B-LOC⟧",
        4,
        "tags",
    ),
    (
        "seq2seq",
        "bert",
        bases.opposites,
        "[CLS] the film was fine [SEP]\n⟦[CLS] awful [SEP]⟧",
        3,
        "tokens",
    ),
    (
        "embed",
        "bert",
        bases.twins,
        "[CLS] the fine [SEP]\n⟦near: [CLS] awful [SEP]⟧\nfar: [CLS] grim [SEP]",
        1,
        "pairs",
    ),
    (
        "embed",
        "bert",
        bases.likenesses,
        "[CLS] the fine [SEP]\n⟦near (0.9): [CLS] fine day [SEP]⟧",
        1,
        "pairs",
    ),
    (
        {"name": "dpo", "beta": 0.5},
        "llama",
        bases.preferences,
        "Say 0:⟦ yes 0<|endoftext|>⟧\nrejected: ⟦ no<|endoftext|>⟧",
        7,
        "tokens",
    ),
]


@pytest.mark.parametrize(("task", "base", "rows", "text", "learned", "unit"), CASES)
def test_what_is_learned_is_marked_and_counted(
    tokenizers, tmp_path, task, base, rows, text, learned, unit
):
    data = write_lines(tmp_path / "d.jsonl", rows(8))
    seen = preview(str(data), tokenizers[base], task=task, limit=1)
    (shown,) = seen.shown
    assert "".join(f"⟦{s.text}⟧" if s.learned else s.text for s in shown.spans) == text
    assert shown.learned == learned
    assert (seen.unit, len(seen.lengths), seen.bad) == (unit, 8, [])
    assert seen.learned >= 8 * min(learned, 1)


def test_labels_are_found_before_anything_is_shown(tokenizers, tmp_path):
    rows = [*bases.opinions(4), {"text": "fine", "label": [1]}, {"text": "fine"}]
    data = write_lines(tmp_path / "d.jsonl", rows)
    seen = preview(str(data), tokenizers["bert"], task={"name": "seq-cls", "problem": "single"})
    assert seen.task["labels"] == ("1", "bad", "good")
    assert [bad.line for bad in seen.bad] == [5, 6]
