"""The task classes: what each kind of model adds to `PeftModel`."""

from __future__ import annotations

from multigraft.model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; each adapter trains its own head."""

    default_saved_modules = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; each adapter trains its own head."""

    default_saved_modules = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question-answering model with adapters; each adapter trains its own head."""

    default_saved_modules = ("qa_outputs",)


class PeftModelForFeatureExtraction(PeftModel):
    """An embedding model with adapters."""
