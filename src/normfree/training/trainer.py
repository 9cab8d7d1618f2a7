"""A small Trainer subclass: data order, parameter groups and a look at the gradients before clipping.

`compute_loss` is never overridden: an override that ignores `num_items_in_batch` scales the loss by the
accumulation factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainingArguments

from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.run import RunSpec, TrainSpec
from normfree.store.checkpoints import CheckpointError, checkpoint_bytes, require_space
from normfree.training.data_order import BlockOrder
from normfree.training.guard import Divergence, NonFiniteError, earliest, locate, total_gradient_norm
from normfree.training.process import keep_fp32_products

_WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Where every process holds all gradients, so that their norm is known without asking the others."""

MINIMUM_SCALE = 1e-4
"""Of fp16's gradient scaler, which starts at 65,536 and halves with each step whose gradients overflow."""


class NormFreeTrainer(Trainer):
    """Trainer for one RunSpec.

    A step whose loss or gradient is not finite, or whose gradients overflow fp16 at any scale, never reaches the
    optimiser: it is left out where `train.on_nonfinite` allows that (appended to `skipped`, then `on_skip` is called),
    else NonFiniteError is raised. `publish` gets the step of each checkpoint in the output folder and the losses that
    no log line has told yet; `unlogged` brings those back on a resume.
    """

    def __init__(
        self,
        *,
        spec: RunSpec,
        start_step: int,
        skipped: list[Divergence],
        on_skip: Callable[[Divergence], None],
        publish: Callable[[int, dict[str, Any]], None],
        unlogged: dict[str, Any] | None,
        model: NormFreePreTrainedModel,
        args: TrainingArguments,
        **rest: Any,
    ) -> None:
        self.spec = spec
        self.start_step = start_step
        self.skipped = skipped
        self.on_skip = on_skip
        self.publish = publish
        self.unlogged = unlogged
        self.network = model
        self._batches_of_step: list[dict[str, Tensor]] = []
        self._loss_before_step = torch.zeros(())
        self._gradient_norm: Tensor | None = None
        super().__init__(model=model, args=args, **rest)
        keep_fp32_products()  # args and Accelerate turn TF32 on for the whole process where they compile

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        batch = self.spec.train.batch_sequences
        return BlockOrder(
            blocks=len(train_dataset if train_dataset is not None else self.train_dataset),  # pyright: ignore[reportArgumentType]
            sequences=self.args.max_steps * batch,
            seed=self.spec.data_seed,
            start=self.start_step * batch,
        )

    def get_train_dataloader(self) -> DataLoader:
        """The loader, with a random generator of its own: the order comes from the sampler, and a draw from torch's own
        generator when the loader begins would shift every dropout mask after a resume."""
        loader = super().get_train_dataloader()
        for part in (loader, getattr(loader, "base_dataloader", loader)):
            part.generator = torch.Generator()
        return loader

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
        if self.unlogged is not None:
            self._tr_loss.add_(self.unlogged["loss_sum"])
            self._globalstep_last_logged = self.unlogged["since_step"]
            self.unlogged = None
        if not self._batches_of_step:
            self._loss_before_step = self._tr_loss.clone()
        self._batches_of_step.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            overflows_at_any_scale = scaler is not None and scaler.get_scale() < MINIMUM_SCALE
            if not self._is_finite(loss) or overflows_at_any_scale:
                self._skip_or_stop()
                loss = torch.zeros_like(loss)
            self._batches_of_step.clear()
        return loss

    def _is_finite(self, loss: Tensor) -> bool:
        looked_at = self._tr_loss + loss  # earlier micro-batches too
        if self.accelerator.scaler is None:  # fp16's scaler meets infinite gradients by design and skips them itself
            self._gradient_norm = total_gradient_norm(self.network.parameters())
            looked_at = looked_at + self._gradient_norm
        over_processes = cast(Tensor, self.accelerator.reduce(looked_at))  # every process must take the same branch
        return bool(torch.isfinite(over_processes))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self._gradient_norm is None or self.accelerator.distributed_type not in _WHOLE_GRADIENTS:
            return cast(Tensor, super()._clip_grad_norm(model))
        nn.utils.clip_grads_with_norm_(self.network.parameters(), self.args.max_grad_norm, self._gradient_norm)
        return self._gradient_norm

    def _skip_or_stop(self) -> None:
        """Leave this step out of weights, Adam and the logged mean loss, or raise NonFiniteError."""
        batches = [self._prepare_inputs(batch) for batch in self._batches_of_step]
        mine = locate(self.network, batches, step=self.state.global_step + 1)
        found = earliest(gather_object([mine]))  # each process has another part of the batch
        if len(self.skipped) >= self.spec.train.skips_allowed:
            raise NonFiniteError(found)
        if self.accelerator.scaler is None:
            self.network.zero_grad(set_to_none=True)  # AdamW passes over parameters without a gradient, decay included
        else:  # an infinite loss may have finite gradients, and the scaler would take the step
            for gradient in (parameter.grad for parameter in self.network.parameters()):
                if gradient is not None:
                    gradient.fill_(math.inf)
        self._tr_loss.copy_(self._loss_before_step)
        self._globalstep_last_logged += 1  # Trainer divides the sum of losses by the steps since then
        self.skipped.append(found)
        self.on_skip(found)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs and self.skipped and self.skipped[-1].step == self.state.global_step:
            logs["grad_norm"] = math.nan  # no gradient was left to clip
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = self.network.all_tied_weights_keys  # saved once, under the name of the tensor they share
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            folder = Path(self._get_output_dir(trial)).parent
            size = checkpoint_bytes(sum(parameter.numel() for parameter in self.network.parameters()))
            require_space(folder, size, "a checkpoint")
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells a full disk by a RuntimeError
            raise CheckpointError(self.state.global_step, error) from error
        mean = self.accelerator.reduce(self._tr_loss, "mean")
        unlogged = {"loss_sum": cast(Tensor, mean).item(), "since_step": self._globalstep_last_logged}
        try:
            self.publish(self.state.global_step, unlogged)
        except OSError as error:
            raise CheckpointError(self.state.global_step, error) from error


def parameter_groups(model: NormFreePreTrainedModel, train: TrainSpec) -> list[dict[str, Any]]:
    """Matrices and embeddings are decayed, biases and norms never, slopes only when asked."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    slope_names = model.negative_slopes()
    slopes = [p for name, p in named if name in slope_names]
    rest = [p for name, p in named if name not in slope_names]
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
