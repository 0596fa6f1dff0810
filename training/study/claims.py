"""The method's claims (arXiv 2504.07448) as experiments: adapters to train, ways to merge them, and tasks to measure them on.

Each claim is a function that yields results.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori.mask import GRANULARITIES
from lori.merge_options import MergeOptions
from training.config import FitConfig
from training.evaluation.figures import Figures
from training.study.config import SAFETY, Claim
from training.study.lab import Lab

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
METHODS = (MergeOptions("ties"), MergeOptions("dare_linear"), MergeOptions("dare_ties"), MergeOptions("magnitude"))
BASE, ALONE = "base", "alone"


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement of a claim: the method or base (`what`), the setting, the task, and the figures."""

    what: str
    setting: str
    task: str
    figures: Figures


def lora(lab: Lab, task: str) -> Path:
    """Return the folder of the LoRA adapter of `task`."""
    return lab.adapter(f"{task}-lora", task, method="lora", lr=lab.config.lora_lr)


def lori_d(lab: Lab, task: str) -> Path:
    """Return the folder of the LoRI-D adapter. Its values are stored in float32, since masks rank them."""
    return lab.adapter(f"{task}-lori-d", task, method="lori-d", values="float32", calibration_lr=lab.config.calibration_lr)


def lori_s(lab: Lab, task: str) -> Path:
    """Return the folder of the LoRI-S adapter, with a mask from the LoRI-D adapter."""
    return lab.adapter(f"{task}-lori-s", task, mask_from=lori_d(lab, task), lr=lab.config.lr)


def lori_within_budget(lab: Lab, task: str) -> Path:
    """Return the folder of a LoRI-S adapter whose LoRI-D and LoRI-S together have the steps of one phase."""
    calibration = lab.config.steps // 3
    length: dict[str, Any] = {"calibration_steps": calibration, "steps": lab.config.steps - calibration}
    return lab.adapter(f"{task}-lori-all-in", task, **length, **lab.rates)


def lori_own_basis(lab: Lab, task: str) -> Path:
    """Return the folder of a LoRI-S adapter on a basis of the task's own, as in the paper."""
    return lab.adapter(f"{task}-lori-own", task, stream=1 + list(lab.config.tasks).index(task), **lab.rates)


def lori_other_tasks(lab: Lab, task: str) -> Path:
    """Return the folder of a LoRI-S adapter with the same mask, with other tasks' prompts and the base's answers mixed in."""
    other_tasks = [other for other in lab.config.tasks if other != task]
    return lab.adapter(f"{task}-lori-others", task, mixed_tasks=other_tasks, mask_from=lori_d(lab, task), lr=lab.config.lr)


def lori_instructions(lab: Lab, task: str) -> Path:
    """Return the folder of a LoRI-S adapter with the same mask, with ordinary instructions and the base's answers mixed in."""
    if lab.instruction_tasks == [task]:  # the adapter of such a task is always trained with its own instructions mixed in
        return lori_s(lab, task)
    return lab.adapter(f"{task}-lori-instructed", task, mixes_instructions=True, mask_from=lori_d(lab, task), lr=lab.config.lr)


SINGLE: Mapping[str, Callable[[Lab, str], Path]] = {
    "LoRA": lora, "LoRI-D": lori_d, "LoRI-S": lori_s, "LoRI-S, mask within the budget": lori_within_budget,
}  # fmt: skip
MERGED: Mapping[str, Callable[[Lab, str], Path]] = {
    "LoRA": lora, "LoRI, shared basis": lori_s, "LoRI, a basis per task": lori_own_basis,
    "LoRI, shared, others' prompts mixed in": lori_other_tasks, "LoRI, shared, instructions mixed in": lori_instructions,
}  # fmt: skip


def single(lab: Lab) -> Iterator[Result]:
    """Yield results of the base, LoRA, LoRI-D and LoRI-S on each task."""
    for task in lab.config.tasks:
        yield Result(BASE, "", task, lab.figures("base", task, []))
        for what, train in SINGLE.items():
            folder = train(lab, task)
            yield Result(what, "", task, lab.figures(folder.name, task, [folder]))


def merges(lab: Lab) -> Iterator[Result]:
    """Yield results of merges of several adapters over a grid of weights, and of each adapter alone.

    Adapters are merged by sum and, on one basis, by the other methods, too.
    """
    merged = {what: train for what, train in MERGED.items() if train is not lori_instructions or lab.instruction_tasks}
    for task in lab.config.tasks:
        yield Result(BASE, ALONE, task, lab.figures("base", task, [], num_rows=lab.config.num_merge_rows))
        for what, train in merged.items():
            yield from _merged(lab, what, [task], [train(lab, task)], 1.0, MergeOptions())
    for tasks, (what, train) in itertools.product(lab.config.merged_tasks, merged.items()):
        folders = [train(lab, task) for task in tasks]
        methods = (MergeOptions(), *METHODS) if train is lori_s else (MergeOptions(),)
        weights = {f"{weight:.2f}": weight for weight in (*lab.config.weights, 1 / len(tasks))}
        for options, weight in itertools.product(methods, sorted(weights.values())):
            yield from _merged(lab, what, tasks, folders, weight, options)


def _merged(
    lab: Lab, what: str, tasks: Sequence[str], folders: Sequence[Path], weight: float, options: MergeOptions
) -> Iterator[Result]:
    name = f"{'+'.join(folder.name for folder in folders)}.{options.method}.{weight!r}"
    setting = f"{'+'.join(tasks)}, {options.method}, {weight:.2f}" if len(tasks) > 1 else ALONE
    for task in tasks:
        figures = lab.figures(name, task, folders, [weight] * len(folders), options, lab.config.num_merge_rows)
        yield Result(what, setting, task, figures)


def continual(lab: Lab) -> Iterator[Result]:
    """Yield results of continual learning: safety first, then another task, measured on both."""
    for task, (what, first) in itertools.product(lab.config.swept, {"LoRA": lora, "LoRI-D": lori_d, "LoRI-S": lori_s}.items()):
        start = first(lab, SAFETY)
        options: dict[str, Any] = {"init_from": start}
        if what == "LoRA":
            options |= {"method": "lora", "lr": lab.config.lora_lr}
        elif what == "LoRI-D":
            options |= {"method": "lori-d", "calibration_lr": lab.config.calibration_lr}
        else:
            options |= {"mask_from": lori_d(lab, task), "lr": lab.config.lr}
        folders = {what: lab.adapter(f"{SAFETY}-then-{task}-{what.lower()}", task, **options)}
        if what == "LoRI-S":
            disjoint = lab.adapter(f"{SAFETY}-then-{task}-disjoint", task, **options, avoid=[start])
            folders |= {"LoRI-S, disjoint mask": disjoint}
        yield Result(f"{what} before", task, SAFETY, lab.figures(start.name, SAFETY, [start]))
        for name, folder in folders.items():
            for measured_task in (SAFETY, task):
                yield Result(name, task, measured_task, lab.figures(folder.name, measured_task, [folder]))


def sparsity(lab: Lab) -> Iterator[Result]:
    """Yield results of LoRI-S at several sparsities."""
    for task, fraction in itertools.product(lab.config.swept, SPARSITIES):
        folder = lori_s(lab, task)
        if fraction != FitConfig.model_fields["sparsity"].default:
            folder = lab.adapter(
                f"{task}-sparsity-{fraction:g}", task, mask_from=lori_d(lab, task), sparsity=fraction, lr=lab.config.lr
            )
        yield Result("LoRI-S", f"{fraction:g}", task, lab.figures(folder.name, task, [folder]))


def granularity(lab: Lab) -> Iterator[Result]:
    """Yield results of LoRI-S at each granularity of the mask."""
    for task, group in itertools.product(lab.config.swept, GRANULARITIES):
        folder = lori_s(lab, task)
        if group != FitConfig.model_fields["granularity"].default:
            folder = lab.adapter(f"{task}-by-{group}", task, mask_from=lori_d(lab, task), granularity=group, lr=lab.config.lr)
        yield Result("LoRI-S", group, task, lab.figures(folder.name, task, [folder]))


CLAIMS: Mapping[Claim, Callable[[Lab], Iterator[Result]]] = {
    "single": single, "merges": merges, "continual": continual, "sparsity": sparsity, "granularity": granularity,
}  # fmt: skip
