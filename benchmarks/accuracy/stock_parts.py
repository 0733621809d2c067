"""Replace parts of ours by transformers' own, one at a time, to measure the effect of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from pycocotools import mask as coco_mask
from torch import nn
from torch.optim import Optimizer
from transformers import Mask2FormerImageProcessorPil, Trainer

from m2f_trainer.inference.instances import Instances
from m2f_trainer.model import mask2former
from m2f_trainer.training import trainer
from m2f_trainer.training.optimizer import HEAD


@contextmanager
def initialisation() -> Iterator[None]:
    """New layers are initialised by transformers' `_init_weights`."""
    replaced = {"NECK_LAYERS": (), "init_head_layer": _nothing, "init_class_head": _nothing}
    with patch.multiple(mask2former, **replaced):  # type: ignore[arg-type]
        yield


def _nothing(module: nn.Module) -> None:
    pass


def trainer_groups(model: nn.Module, args: Any) -> Optimizer:
    """An optimizer with the Trainer's own two groups: one learning rate, weight decay on all but norms and biases."""
    factory, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [
        {"name": HEAD, "params": [], "lr": args.learning_rate, "weight_decay": decay}
        for decay in (0.0, args.weight_decay)
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed]["params"].append(parameter)
    optimizer: Optimizer = factory(groups, **settings)
    return optimizer


def postprocessed(outputs: Any, inputs: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> list[Instances]:
    """Outputs of a batch -> Instances by `post_process_instance_segmentation`, called as in the example."""
    sizes = [tuple(size) for size in inputs["original_size"].tolist()]
    found = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
    )
    return [
        _instances(one, int(image_id), size, categories)
        for one, image_id, size in zip(found, inputs["image_id"], sizes, strict=True)
    ]


def _instances(
    found: Mapping[str, Any], image_id: int, size: tuple[int, int], categories: Sequence[Mapping[str, Any]]
) -> Instances:
    segments = found["segments_info"]
    maps = np.asarray(found["segmentation"], dtype=np.uint8).reshape(-1, *size) if segments else np.zeros((0, *size))
    kept = [k for k in np.argsort([-one["score"] for one in segments], kind="stable") if maps[k].any()]
    rles = [coco_mask.encode(np.asfortranarray(maps[k], dtype=np.uint8)) for k in kept]
    return Instances(
        image_id,
        np.array([categories[segments[k]["label_id"]]["id"] for k in kept], dtype=np.int64),
        np.array([segments[k]["score"] for k in kept], dtype=np.float64),
        rles,
        np.array([coco_mask.toBbox(rle) for rle in rles], dtype=np.float64).reshape(-1, 4),
        size,
    )


PARTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "initialisation": initialisation,
    "groups": lambda: patch.object(trainer, "build_optimizer", trainer_groups),
    "postprocessing": lambda: patch.object(trainer, "instances_of", postprocessed),
}
