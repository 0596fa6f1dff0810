"""The method's claims (arXiv 2504.07448) as trainings and measurements: which adapters, merged how, measured on what.

A claim gives rows: what it is, the task, and the figures.
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
class Found:
    """One measurement of a claim: what was measured, at which setting, on which task."""

    what: str
    setting: str
    task: str
    figures: Figures


def lora(lab: Lab, task: str) -> Path:
    """Return LoRA's adapter of `task`."""
    return lab.adapter(f"{task}-lora", task, method="lora", lr=lab.config.lora_lr)


def lori_d(lab: Lab, task: str) -> Path:
    """Return LoRI-D's, its values as they were trained, since masks are drawn from them."""
    return lab.adapter(f"{task}-lori-d", task, method="lori-d", values="float32", calibration_lr=lab.config.calibration_lr)


def lori_s(lab: Lab, task: str) -> Path:
    """Return LoRI-S's, on the mask of LoRI-D's."""
    return lab.adapter(f"{task}-lori-s", task, mask_from=lori_d(lab, task), lr=lab.config.lr)


def lori_all_in(lab: Lab, task: str) -> Path:
    """Return LoRI-S's whose mask and training together had the steps of one phase."""
    calibration = lab.config.steps // 3
    length: dict[str, Any] = {"calibration_steps": calibration, "steps": lab.config.steps - calibration}
    return lab.adapter(f"{task}-lori-all-in", task, **length, **lab.rates)


def lori_own(lab: Lab, task: str) -> Path:
    """Return LoRI-S's on a basis of the task's own, as the paper draws them."""
    return lab.adapter(f"{task}-lori-own", task, stream=1 + list(lab.config.tasks).index(task), **lab.rates)


def lori_others(lab: Lab, task: str) -> Path:
    """Return LoRI-S's, on the same mask, that is held to the base's own answers on the other tasks' prompts."""
    others = [other for other in lab.config.tasks if other != task]
    return lab.adapter(f"{task}-lori-others", task, kept=others, mask_from=lori_d(lab, task), lr=lab.config.lr)


def lori_instructed(lab: Lab, task: str) -> Path:
    """Return LoRI-S's, on the same mask, that is held to the base's own answers on ordinary instructions."""
    if lab.instructing == [task]:  # it is anyway
        return lori_s(lab, task)
    return lab.adapter(f"{task}-lori-instructed", task, instructed=True, mask_from=lori_d(lab, task), lr=lab.config.lr)


SINGLE: Mapping[str, Callable[[Lab, str], Path]] = {
    "LoRA": lora, "LoRI-D": lori_d, "LoRI-S": lori_s, "LoRI-S, mask within the budget": lori_all_in,
}  # fmt: skip
MERGED: Mapping[str, Callable[[Lab, str], Path]] = {
    "LoRA": lora, "LoRI, shared basis": lori_s, "LoRI, a basis per task": lori_own,
    "LoRI, shared, others' prompts mixed in": lori_others, "LoRI, shared, instructions mixed in": lori_instructed,
}  # fmt: skip


def single(lab: Lab) -> Iterator[Found]:
    """Base, LoRA, LoRI-D and LoRI-S on each task."""
    for task in lab.config.tasks:
        yield Found(BASE, "", task, lab.measured("base", task, []))
        for what, train in SINGLE.items():
            folder = train(lab, task)
            yield Found(what, "", task, lab.measured(folder.name, task, [folder]))


def merges(lab: Lab) -> Iterator[Found]:
    """Merge of 2, 3 and 4 adapters over a grid of weights, by sum and, on one basis, by the other methods; each alone, too."""
    merged = {what: train for what, train in MERGED.items() if train is not lori_instructed or lab.instructing}
    for task in lab.config.tasks:
        yield Found(BASE, ALONE, task, lab.measured("base", task, [], num_rows=lab.config.num_merge_rows))
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
) -> Iterator[Found]:
    name = f"{'+'.join(folder.name for folder in folders)}.{options.method}.{weight!r}"
    setting = f"{'+'.join(tasks)}, {options.method}, {weight:.2f}" if len(tasks) > 1 else ALONE
    for task in tasks:
        figures = lab.measured(name, task, folders, [weight] * len(folders), options, lab.config.num_merge_rows)
        yield Found(what, setting, task, figures)


def continual(lab: Lab) -> Iterator[Found]:
    """Safety first, then a task: what is left of the first, and what is learnt of the second."""
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
        yield Found(f"{what} before", task, SAFETY, lab.measured(start.name, SAFETY, [start]))
        for name, folder in folders.items():
            for measured in (SAFETY, task):
                yield Found(name, task, measured, lab.measured(folder.name, measured, [folder]))


def sparsity(lab: Lab) -> Iterator[Found]:
    """LoRI-S by the share of B that is left out."""
    for task, share in itertools.product(lab.config.swept, SPARSITIES):
        folder = lori_s(lab, task)
        if share != FitConfig.model_fields["sparsity"].default:
            folder = lab.adapter(
                f"{task}-sparsity-{share:g}", task, mask_from=lori_d(lab, task), sparsity=share, lr=lab.config.lr
            )
        yield Found("LoRI-S", f"{share:g}", task, lab.measured(folder.name, task, [folder]))


def granularity(lab: Lab) -> Iterator[Found]:
    """LoRI-S by what the mask's entries are ranked against."""
    for task, group in itertools.product(lab.config.swept, GRANULARITIES):
        folder = lori_s(lab, task)
        if group != FitConfig.model_fields["granularity"].default:
            folder = lab.adapter(f"{task}-by-{group}", task, mask_from=lori_d(lab, task), granularity=group, lr=lab.config.lr)
        yield Found("LoRI-S", group, task, lab.measured(folder.name, task, [folder]))


CLAIMS: Mapping[Claim, Callable[[Lab], Iterator[Found]]] = {
    "single": single, "merges": merges, "continual": continual, "sparsity": sparsity, "granularity": granularity,
}  # fmt: skip
