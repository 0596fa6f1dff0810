"""One phase of training: transformers' Trainer on steps that are planned and packed. Knows nothing of masks and adapters.

Trainer brings accumulation, clipping, the schedule, checkpoints, early stopping, DDP and FSDP. Its own batches are not used: the
parts of a step must be weighted by their examples, and no example may be dropped or padded.
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

from training.batches import Part, Step, parts_of
from training.config import FitConfig
from training.loss import Loss
from training.packing import PackedBatch, pack
from training.progress import TrainingError
from training.trainable import at_weight, values_of


def training_arguments(config: FitConfig, folder: Path, lr: float, num_steps: int, is_autocast: bool) -> TrainingArguments:
    """Return Trainer's arguments for a phase of `num_steps` whose checkpoints go to `folder`.

    `is_autocast`: products are in bfloat16 whatever the parameters are in.
    """
    is_held_out = bool(config.held_out or config.held_out_fraction)
    every = config.eval_every if is_held_out else config.save_every
    has_cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        gradient_accumulation_steps=config.accumulation,
        per_device_train_batch_size=1,
        learning_rate=lr,
        lr_scheduler_type="cosine" if config.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=min(round(config.warmup * num_steps), num_steps - 1),  # the first of them has the rate 0
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        seed=config.seed,
        use_cpu=not has_cuda,
        bf16=is_autocast,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if is_held_out else "no",
        eval_steps=every,
        save_steps=every,
        save_total_limit=3 if is_held_out else 2,  # the best, and another beside the newest, which may not be whole yet
        load_best_model_at_end=is_held_out,
        metric_for_best_model="eval_loss" if is_held_out else None,
        greater_is_better=False if is_held_out else None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=has_cuda,
        ddp_find_unused_parameters=False,
    )
    # One process uses one GPU: Trainer would divide a batch over all that it sees, and a packed one cannot be.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


PARAMETERS = "model.safetensors"
"""The trained parameters in a checkpoint, under the name by which Trainer knows one."""


def _pack_one(parts: list[Part]) -> dict[str, PackedBatch]:
    [part] = parts
    return {"batch": pack(part)}


class PhaseTrainer(Trainer):
    """Trains what requires a gradient in `model` on `steps`, each in as many parts as `args` has processes times accumulation.

    `weights`: at which each step applies the adapter, see `batches.parts_of`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: Loss,
        args: TrainingArguments,
        steps: Sequence[Step],
        held_out: Sequence[Part],
        weights: Sequence[float],
        callbacks: list[TrainerCallback],
    ) -> None:
        # Trainer does not resume models that are spread over processes, whose optimizer's state is, too: here it is not.
        args.save_only_model = model.is_distributed_loading_by_transformers
        super().__init__(model, args, eval_dataset=list(held_out) or None, callbacks=callbacks)
        self.network, self.loss, self.held_out = model, loss, held_out
        args.save_only_model = False
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # a part's share is of the whole step
        num_parts = args.world_size * args.gradient_accumulation_steps
        self.parts = parts_of(steps, num_parts, args.process_index, args.world_size, weights)

    def get_train_dataloader(self) -> DataLoader[Part]:
        """Return this process's parts, in order."""
        return DataLoader(self.parts, batch_size=1, shuffle=False, collate_fn=_pack_one)  # type: ignore[arg-type]  # a list will do

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # a resumed run may be over already, and an epoch begins with a step
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers' own

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,  # noqa: ARG002  # Trainer's signature
    ) -> torch.Tensor:
        """Return the part's share of the step's loss, times the processes: DDP and FSDP average over them."""
        assert not return_outputs
        batch: PackedBatch = inputs["batch"]
        model.eval()  # dropout would make the base another one at each look; gradients do not need the mode
        with at_weight(self.network, batch.weight):
            return self.loss(model, batch.to(self.args.device)) * int(self.args.world_size)

    def floating_point_ops(self, inputs: object) -> int:  # noqa: ARG002
        """Not counted: Trainer would guess from a batch's shape."""
        return 0

    @torch.no_grad()
    def evaluate(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> dict[str, float]:
        """Return the held-out loss, each example weighing the same; every process computes its share of the parts."""
        total = torch.zeros((), device=self.args.device)
        model = self.model_wrapped
        # Each process makes as many forward passes, as FSDP needs.
        for first in range(0, len(self.held_out), self.args.world_size):
            place = first + self.args.process_index
            part = self.held_out[min(place, len(self.held_out) - 1)]
            part_loss = self.loss(model, pack(part).to(self.args.device))
            total += part_loss if place < len(self.held_out) else 0.0
        loss = float(self.accelerator.reduce(total, reduction="sum"))
        if not math.isfinite(loss):
            raise TrainingError(f"the held-out loss is {loss} at step {self.state.global_step}: a lower learning rate may help")
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def trained(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name, on the CPU. All processes must ask."""
        return {name: values_of(p) for name, p in self.network.named_parameters() if p.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters; the frozen ones are the base's."""
        tensors = self.trained()
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
    """Put `tensors` into the parameters of these names."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
