"""transformers' Trainer on one process or, under torchrun, on several.

trainer_script.py FOLDER ROWS      ROWS of a batch on each process
"""

from __future__ import annotations

import sys

import torch
from transformers import Trainer, TrainingArguments

from tests.distributed.tiny import adapted, base, batch


def main(folder: str, rows: int) -> None:
    torch.set_num_threads(1)
    model = adapted(base(torch.float32), "default", "idle")
    data = [{"input_ids": row, "labels": row} for step in range(4) for row in batch(step)]
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
