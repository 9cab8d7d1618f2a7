"""A small Trainer subclass: data order, parameter groups and a look at the gradients before clipping.

`compute_loss` is never overridden: an override that ignores `num_items_in_batch` scales the loss by the
accumulation factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

from normfree.config import RunSpec, TrainSpec
from normfree.training.data_order import BlockOrder
from normfree.training.guard import NonFiniteError, locate, total_gradient_norm


class NormFreeTrainer(Trainer):
    """Trainer for one RunSpec. Raises NonFiniteError before the optimiser sees a non-finite gradient."""

    def __init__(
        self, *, spec: RunSpec, start_step: int, model: nn.Module, args: TrainingArguments, **rest: Any
    ) -> None:
        self.spec = spec
        self.start_step = start_step
        self.network = model
        self._batches_of_step: list[dict[str, Tensor]] = []
        super().__init__(model=model, args=args, **rest)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        batch = self.spec.train.batch_sequences
        return BlockOrder(
            blocks=len(train_dataset if train_dataset is not None else self.train_dataset),  # pyright: ignore[reportArgumentType]
            sequences=self.args.max_steps * batch,
            seed=self.spec.data_seed,
            start=self.start_step * batch,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(parameter_groups(self.network, self.spec.train), **options)
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        self._batches_of_step.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._refuse_nonfinite(loss)
            self._batches_of_step.clear()
        return loss

    def _refuse_nonfinite(self, loss: Tensor) -> None:
        looked_at = loss
        if self.accelerator.scaler is None:  # fp16's scaler meets infinite gradients by design and skips them itself
            looked_at = loss + total_gradient_norm(self.network.parameters())
        if not torch.isfinite(looked_at):
            batches = [self._prepare_inputs(batch) for batch in self._batches_of_step]
            raise NonFiniteError(locate(self.network, batches, step=self.state.global_step + 1))


def parameter_groups(model: nn.Module, train: TrainSpec) -> list[dict[str, Any]]:
    """Matrices and embeddings are decayed, biases and norms never, slopes only when asked."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    slopes = [p for name, p in named if "slope" in name]
    rest = [p for name, p in named if "slope" not in name]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {
            "params": slopes,
            "weight_decay": train.weight_decay if train.decay_slopes else 0.0,
            "lr": train.peak_learning_rate * train.slope_learning_rate_factor,
        },
    ]
    return [group for group in groups if group["params"]]
