"""What our recipes put on top of transformers' learning rate schedules: steps down, and a head that starts alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from m2f_trainer.train_arguments import TrainArguments

Factor = Callable[[int], float]
STEP_DOWN = 0.1  # what a milestone leaves of the learning rate, as in the original's schedule


@dataclass(frozen=True)
class Shape:
    """Factors by step, to be multiplied with those of transformers' schedule.

    The backbone stands still for `head_first` steps and then warms up for `warmup` steps, as in the two stages of EoMT
    (Kerssies et al. 2025, https://arxiv.org/abs/2503.19108); each milestone takes the rate to a tenth.
    """

    head_first: int
    warmup: int
    milestones: tuple[int, ...]

    def head(self, step: int) -> float:
        """Of neck and head."""
        return float(STEP_DOWN ** sum(step >= milestone for milestone in self.milestones))

    def backbone(self, step: int) -> float:
        """Of the backbone, LoRA included."""
        ramp = (step - self.head_first) / self.warmup if self.warmup else float(step >= self.head_first)
        return self.head(step) * (min(max(ramp, 0.0), 1.0) if self.head_first else 1.0)


def shape_of(arguments: TrainArguments, total: int) -> Shape:
    """The shape that a recipe asks for, in a run of so many steps; fields below 1 are shares of it."""
    first = arguments.head_first_steps
    steps = int(first if first >= 1 else first * total)
    milestones = tuple(round(share * total) for share in arguments.lr_milestones or ())
    return Shape(steps, arguments.get_warmup_steps(total), milestones)


class ShapedRates(TrainerCallback):
    """Puts the recipe's shape on the schedule that the Trainer has made."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Multiply each group's factor, and set the rates of the step that the run begins with."""
        schedule = kwargs["lr_scheduler"]
        if not isinstance(args, TrainArguments) or not isinstance(schedule, LambdaLR):
            return
        if args.head_first_steps or args.lr_milestones:
            put_on(schedule, kwargs["optimizer"].param_groups, shape_of(args, state.max_steps), state.global_step)


def put_on(schedule: LambdaLR, groups: list[dict[str, Any]], shape: Shape, step: int) -> None:
    """Multiply the shape into a schedule's factors, and set the groups' rates at a step."""
    shapes = [shape.backbone if group["name"].startswith("backbone") else shape.head for group in groups]
    schedule.lr_lambdas = [_product(one, other) for one, other in zip(schedule.lr_lambdas, shapes, strict=True)]
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)
    schedule._last_lr = [group["lr"] for group in groups]


def _product(one: Factor, other: Factor) -> Factor:
    return lambda step: one(step) * other(step)


def curve(arguments: TrainArguments, total: int) -> tuple[Factor, Factor]:
    """Factor of the learning rate by step in a run of so many: neck and head's, and the backbone's."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    plain = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(total),
        total,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    shape = shape_of(arguments, total)
    factor: Factor = plain.lr_lambdas[0] if isinstance(plain, LambdaLR) else lambda _: 1.0
    return _product(factor, shape.head), _product(factor, shape.backbone)
