"""What transformers' Trainer is told of a phase."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from training.config import FitConfig


def training_arguments(config: FitConfig, folder: Path, lr: float, num_steps: int, is_autocast: bool) -> TrainingArguments:
    """Returns Trainer's arguments for a phase of `num_steps` whose checkpoints go to `folder`.

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
