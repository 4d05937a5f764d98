"""What a type checker must refuse: each marked line, with the code that mypy gives it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import multigraft
from multigraft import LoraConfig, PeftModel, TaskType


def wrong(base: nn.Module, model: PeftModel, config: LoraConfig) -> None:
    """Slips of the kind that one makes."""
    LoraConfig(rank=8)  # refused: call-arg
    LoraConfig(r="8")  # refused: arg-type
    LoraConfig(target_modules=3)  # refused: arg-type
    multigraft.get_peft_model(config, base)  # refused: arg-type
    multigraft.get_peft_model(base)  # refused: call-arg
    multigraft.get_peft_model(base, config, name="a")  # refused: call-arg
    multigraft.get_peft_modell(base, config)  # refused: attr-defined
    model.add_adapter(config, "a")  # refused: arg-type
    model.set_adapter(1)  # refused: arg-type
    model(1, adapter_names="a")
    model.forward(1, adapter_names=[1])  # refused: list-item
    model.save_pretrained()  # refused: call-arg
    model.load_adapter(Path("a"), "a", strict="yes")  # refused: arg-type
    model.base_model.merge_adapter("a", keep="yes")  # refused: call-arg
    model.base_model.no_such_verb()
    model.merge_adapter(["a"], keep="yes")  # refused: call-arg
    model.add_weighted_adapter(["a"], "0.5", "b")  # refused: arg-type
    model.unmerge_adapter(3)  # refused: arg-type
    PeftModel.from_pretrained("a", base)  # refused: arg-type
    TaskType.CHAT  # noqa: B018  # refused: attr-defined
    multigraft.extract_lora(base, base)  # refused: call-arg
    multigraft.verify(model).errors  # noqa: B018  # refused: attr-defined
    names: str = model.active_adapters  # refused: assignment
    print(names)
