"""Lightning fits, saves and restores a module that holds an adapted model."""

from __future__ import annotations

import tempfile
from typing import Any

import lightning
import torch
from facts import apart, tell
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
        self.model = get_peft_model(net(), config)

    def training_step(self, batch: Any, index: int) -> Tensor:
        inputs, wanted = batch
        return nn.functional.cross_entropy(self.model(inputs), wanted)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def trainer(epochs: int, folder: str) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


if __name__ == "__main__":
    facts: dict[str, Any] = {}
    folder = tempfile.mkdtemp()
    module, inputs = Module(), torch.randn(16, 4)
    rows = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=8)
    first = trainer(2, folder)
    first.fit(module, rows)
    layer = module.model.get_base_model()[0]
    facts["the pair was trained"] = bool(layer.lora_B["default"].weight.any())
    facts["the base was not"] = bool((layer.base_layer.weight == net()[0].weight).all())
    path = first.checkpoint_callback.best_model_path
    again = Module.load_from_checkpoint(path)
    facts["restored"] = apart(again.model.eval()(inputs), module.model.eval()(inputs))
    facts["learned"] = apart(again.model(inputs), net()(inputs)) > 0
    more = trainer(3, folder)
    more.fit(Module(), rows, ckpt_path=path)
    facts["resumed"] = more.current_epoch
    tell(facts)
