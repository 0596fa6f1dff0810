"""One phase of training: transformers' Trainer on planned and packed steps. Knows nothing of masks and adapters.

Trainer provides gradient accumulation, clipping, the learning rate schedule, checkpoints, DDP and FSDP. Trainer's own batching is
not used: the micro-batches of a step must be weighted by their examples, and no example may be dropped or padded.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from training.batches import MicroBatch, Step, micro_batches
from training.config import FitConfig
from training.loss import Loss
from training.packing import PackedBatch, pack
from training.progress import TrainingError
from training.trainable import at_adapter_weight, values_of


def training_arguments(config: FitConfig, folder: Path, lr: float, num_steps: int, is_autocast: bool) -> TrainingArguments:
    """Return Trainer's arguments for a phase of `num_steps` whose checkpoints go to `folder`.

    With `is_autocast`, matrix products are in bfloat16 whatever the dtype of the parameters.
    """
    is_held_out = bool(config.held_out or config.held_out_fraction)
    interval = config.eval_every if is_held_out else config.save_every
    has_cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        gradient_accumulation_steps=config.accumulation,
        per_device_train_batch_size=1,
        learning_rate=lr,
        lr_scheduler_type="cosine" if config.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=min(round(config.warmup * num_steps), num_steps - 1),  # the first warm-up step has the rate 0
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        seed=config.seed,
        use_cpu=not has_cuda,
        bf16=is_autocast,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if is_held_out else "no",
        eval_steps=interval,
        save_steps=interval,
        save_total_limit=3 if is_held_out else 2,  # the best, the newest, and one before it, since the newest may be incomplete
        load_best_model_at_end=is_held_out,
        metric_for_best_model="eval_loss" if is_held_out else None,
        greater_is_better=False if is_held_out else None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=has_cuda,
        ddp_find_unused_parameters=False,
    )
    # One process uses one GPU. Trainer would split a batch over all visible GPUs, and a packed batch cannot be split.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


PARAMETERS = "model.safetensors"
"""File of the trained parameters in a checkpoint, under the name that Trainer looks for."""


def _collate(micro_batches: list[MicroBatch]) -> dict[str, PackedBatch]:
    [micro_batch] = micro_batches
    return {"batch": pack(micro_batch)}


class PhaseTrainer(Trainer):
    """Trainer of the parameters of `model` that require a gradient, on `steps`.

    The number of micro-batches of a step is the number of processes times the accumulation steps of `args`. `weights`: the weight
    at which each step applies the adapter, see `batches.micro_batches`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: Loss,
        args: TrainingArguments,
        steps: Sequence[Step],
        held_out: Sequence[MicroBatch],
        weights: Sequence[float],
        callbacks: list[TrainerCallback],
    ) -> None:
        # Trainer refuses to resume sharded models unless it saves the model alone, since their optimizer state would be sharded,
        # too. Here the trained parameters and their optimizer state are not sharded.
        args.save_only_model = model.is_distributed_loading_by_transformers
        super().__init__(model, args, eval_dataset=list(held_out) or None, callbacks=callbacks)
        self.network, self.loss, self.held_out = model, loss, held_out
        args.save_only_model = False
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # the share of a micro-batch is already relative to the whole step
        num_micro_batches = args.world_size * args.gradient_accumulation_steps
        self.micro_batches = micro_batches(steps, num_micro_batches, args.process_index, args.world_size, weights)

    def get_train_dataloader(self) -> DataLoader[MicroBatch]:
        """Return a loader of this process's micro-batches, in order."""
        return DataLoader(self.micro_batches, batch_size=1, shuffle=False, collate_fn=_collate)  # type: ignore[arg-type]  # a list

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # a resumed phase may have stopped already, and an epoch begins with a step
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers' own

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,  # noqa: ARG002  # Trainer's signature
    ) -> torch.Tensor:
        """Return the micro-batch's contribution to the step's loss, times the number of processes.

        DDP and FSDP average the gradients over the processes, which cancels that factor.
        """
        assert not return_outputs
        batch: PackedBatch = inputs["batch"]
        model.eval()  # without dropout the base's logits are always the same; gradients do not depend on the mode
        with at_adapter_weight(self.network, batch.adapter_weight):
            return self.loss(model, batch.to(self.args.device)) * int(self.args.world_size)

    def floating_point_ops(self, inputs: object) -> int:  # noqa: ARG002
        """Return 0: Trainer would estimate the operations from the shape of unpacked batches."""
        return 0

    @torch.no_grad()
    def evaluate(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> dict[str, float]:
        """Return the held-out loss, with the same weight for each example. Each process computes a part of the batches."""
        total = torch.zeros((), device=self.args.device)
        model = self.model_wrapped
        # All processes make the same number of forward passes, as FSDP needs.
        for first in range(0, len(self.held_out), self.args.world_size):
            index = first + self.args.process_index
            micro_batch = self.held_out[min(index, len(self.held_out) - 1)]
            batch_loss = self.loss(model, pack(micro_batch).to(self.args.device))
            total += batch_loss if index < len(self.held_out) else 0.0
        loss = float(self.accelerator.reduce(total, reduction="sum"))
        if not math.isfinite(loss):
            raise TrainingError(f"the held-out loss is {loss} at step {self.state.global_step}: a lower learning rate may help")
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def trained_parameters(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name, on the CPU. All processes must call this."""
        return {name: values_of(p) for name, p in self.network.named_parameters() if p.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters. The frozen ones belong to the base and are not written."""
        tensors = self.trained_parameters()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / PARAMETERS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_parameters(model or self.network, load_file(Path(resume_from_checkpoint) / PARAMETERS))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def load_parameters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into the parameters of the same names."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
