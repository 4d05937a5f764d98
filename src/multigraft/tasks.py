"""The task classes: what each kind of model adds to `PeftModel`."""

from __future__ import annotations

from multigraft.config import PeftConfig
from multigraft.defaults import TASK_HEADS
from multigraft.model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; each adapter trains its own head."""

    default_saved_modules = TASK_HEADS["SEQ_CLS"]


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; each adapter trains its own head."""

    default_saved_modules = TASK_HEADS["TOKEN_CLS"]


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question-answering model with adapters; each adapter trains its own head."""

    default_saved_modules = TASK_HEADS["QUESTION_ANS"]


class PeftModelForFeatureExtraction(PeftModel):
    """An embedding model with adapters."""


class PeftMixedModel(PeftModel):
    """Adapters of different methods, active together; what ``mixed=True`` gives.

    Every `PeftModel` holds adapters of any methods. This one is of PEFT's name, for scripts that
    ask for it, and unlike PEFT's it saves, reports its status and serves mixed batches.
    """

    def _with_defaults(self, config: PeftConfig) -> PeftConfig:
        self.default_saved_modules = TASK_HEADS.get(str(config.task_type), ())
        return super()._with_defaults(config)
