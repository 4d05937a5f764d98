"""What `isinstance` is asked of an adapted layer by scripts written for PEFT.

PEFT has a class of layers for each method. Here one wrapper holds adapters of any methods, so these
classes are questions rather than types: ``isinstance(layer, LoraLayer)`` is whether an adapter of
that kind is there now. None of them can be made; `multigraft.wrap` alone makes adapted layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.methods.saved_module import SavedModule
from multigraft.methods.trainable_tokens import TokenAdapter


class Asked(type):
    """The type of a class whose instances are the layers of which its `serves` says so."""

    def __instancecheck__(cls, instance: object) -> bool:
        if type.__instancecheck__(cls, instance):
            return True
        return isinstance(instance, AdaptedLayer) and any(
            cls.serves(graft)  # type: ignore[attr-defined]
            for graft in instance.all_grafts()
        )


class Question(metaclass=Asked):
    """Base of these classes; `serves` is what each asks."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} is for isinstance() only. Add adapters with get_peft_model() "
            "or model.add_adapter()."
        )

    @classmethod
    def serves(cls, graft: Graft) -> bool:
        """Whether this adapter's part of a layer makes the layer one of these."""
        raise TypeError(f"{cls.__name__} asks nothing.")


class BaseTunerLayer(Question):
    """A layer on which an adapter's method acts; not one that is only saved or trained beside."""

    methods: ClassVar[frozenset[str]] = frozenset()
    """The methods that make a layer one of these; all, where none is named."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    """The groups of tensors that such a layer may have; a layer itself shows those that it has."""

    @classmethod
    def serves(cls, graft: Graft) -> bool:
        """Whether it is of one of the class's methods."""
        return not graft.method.rides and (not cls.methods or graft.method.name in cls.methods)


class LoraLayer(BaseTunerLayer):
    """A layer with a LoRA of any variant, or an AdaLoRA."""

    methods = frozenset({"LORA", "ADALORA"})
    adapter_layer_names = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )


class AdaLoraLayer(LoraLayer):
    """A layer with an AdaLoRA."""

    methods = frozenset({"ADALORA"})
    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")


class HiraLayer(BaseTunerLayer):
    """A layer with a HiRA."""

    methods = frozenset({"HIRA"})
    adapter_layer_names = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")


class IA3Layer(BaseTunerLayer):
    """A layer with an IA3."""

    methods = frozenset({"IA3"})
    adapter_layer_names = ("ia3_l",)


class LNTuningLayer(BaseTunerLayer):
    """A norm of which an adapter trains its own copy."""

    methods = frozenset({"LN_TUNING"})
    adapter_layer_names = ("ln_tuning_layers",)


class LoHaLayer(BaseTunerLayer):
    """A layer with a LoHa."""

    methods = frozenset({"LOHA"})
    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


class LoKrLayer(BaseTunerLayer):
    """A layer with a LoKr."""

    methods = frozenset({"LOKR"})
    adapter_layer_names = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    )


class OFTLayer(BaseTunerLayer):
    """A layer with an OFT."""

    methods = frozenset({"OFT"})
    adapter_layer_names = ("oft_R",)


class TrainableTokensLayer(BaseTunerLayer):
    """An embedding with an adapter of single tokens."""

    methods = frozenset({"TRAINABLE_TOKENS"})
    adapter_layer_names = ("trainable_tokens_delta",)


class VeraLayer(BaseTunerLayer):
    """A layer with a VeRA."""

    methods = frozenset({"VERA"})
    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")


class ModulesToSaveWrapper(Question):
    """A module of which an adapter trains a whole copy (``modules_to_save``)."""

    @classmethod
    def serves(cls, graft: Graft) -> bool:
        """Whether it is such a copy."""
        return isinstance(graft.method, SavedModule)


class TrainableTokensWrapper(Question):
    """An embedding of which an adapter trains single tokens beside its own method."""

    @classmethod
    def serves(cls, graft: Graft) -> bool:
        """Whether it is such a part of an adapter."""
        return isinstance(graft.method, TokenAdapter)


class ParamWrapper(LoraLayer):
    """A module with a LoRA on a parameter that it reads by itself (``target_parameters``)."""

    @classmethod
    def serves(cls, graft: Graft) -> bool:
        """Whether it acts on such a parameter."""
        return super().serves(graft) and graft.site.parameter is not None


class AuxiliaryTrainingWrapper(Question):
    """A module whose part of an adapter's file has other names than PEFT's rule gives it.

    What is saved or trained beside the method is of this kind in PEFT, and more than that here:
    transformers asks these layers, and no others, how they call what a file holds.
    """

    @classmethod
    def serves(cls, graft: Graft) -> bool:
        """Whether it is saved or trained beside, or acts on a parameter."""
        kinds = (ModulesToSaveWrapper, TrainableTokensWrapper, ParamWrapper)
        return any(kind.serves(graft) for kind in kinds)
