"""LightlyTrain's EoMT from the same DINOv2 weights, with its defaults except image size, batch, precision and warm-up.

Its default schedule has 90,000 steps; the head warms up for 2,000 of them and the backbone for 3,000. With a budget of
a few hundred steps both keep their share of the schedule. float32, because bfloat16 is slow on CPUs that lack it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.rivals.task import Task, annotation_file, serve

SCHEDULE, WARM_UP = 90_000, (2_000, 3_000)
MODEL, BACKBONE = "dinov2/vits14-noreg-notpretrained-eomt", "dinov2/vits14-noreg-notpretrained"
os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}


def _package() -> Any:
    """LightlyTrain, with its EoMT also on DINOv2-S without register tokens, which the given weights lack."""
    import lightly_train
    from lightly_train._task_models.dinov2_eomt_instance_segmentation import config

    @config.DINOV2_EOMT_INSTANCE_SEGMENTATION_MODEL_REGISTRY.register(MODEL)
    class WithoutRegisters(config.EoMTInstanceSegmentationConfig):
        backbone_name: str = BACKBONE

    return lightly_train


def train(task: Task) -> dict[str, Any]:
    """Train for the planned steps; LightlyTrain's validation runs once, at the end, on one image."""
    import torch

    lightly_train = _package()
    torch.set_num_threads(1)
    steps, batch, side = task.steps, task.settings["batch"], task.settings["image_size"]
    weights = Path(task.folder, "dinov2.pt")
    torch.save(original_names(task.backbone), weights)
    warm_up = tuple(round(steps * share / SCHEDULE) for share in WARM_UP)
    train_split = annotation_file(task.dataset, "train").absolute()
    data = {"format": "coco", "train": {"annotations": train_split}, "val": {"annotations": one_image(task)}}
    lightly_train.train_instance_segmentation(
        out=Path(task.folder, "run"),
        data=data,
        model=MODEL,
        steps=steps,
        batch_size=batch,
        gradient_accumulation_steps=1,
        num_workers=0,
        devices=1,
        accelerator="cpu",
        precision="32-true",
        seed=task.seed,
        overwrite=True,
        logger_args={"tensorboard": None, "log_every_num_steps": 10, "val_every_num_steps": steps},
        model_args={"backbone_weights": weights, "lr_warmup_steps": warm_up, **task.settings["model_args"]},
        transform_args={"image_size": (side, side)},
    )
    return {"images": steps * batch, "steps": steps}


def one_image(task: Task) -> Path:
    """Write a split with the first validation image only, as a link; return its annotation file."""
    annotations = task.annotations("valid")
    image = annotations["images"][0]
    folder = Path(task.folder, "one").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    link = folder / image["file_name"]
    link.parent.mkdir(parents=True)
    link.symlink_to(task.image("valid", image).absolute())
    objects = [one for one in annotations["annotations"] if one["image_id"] == image["id"]]
    path = folder / "annotations.json"
    path.write_text(json.dumps({**annotations, "images": [image], "annotations": objects}), encoding="utf-8")
    return path


def original_names(backbone: str) -> dict[str, Any]:
    """transformers' DINOv2 weights under the names of the original repository, which LightlyTrain's ViT uses."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(Path(backbone, "model.safetensors"))
    tensors = {name.removeprefix("dinov2."): tensor for name, tensor in tensors.items()}
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed", "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.", "attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma", "layernorm.": "norm.",
    }  # fmt: skip
    renamed = {}
    for name, tensor in tensors.items():
        if ".attention.attention." in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new) if old != "layernorm." or name.startswith(old) else name
        renamed[name] = tensor
    for layer in {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}:
        for kind in ("weight", "bias"):
            parts = [
                tensors[f"encoder.layer.{layer}.attention.attention.{one}.{kind}"] for one in ("query", "key", "value")
            ]
            renamed[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


def predict(task: Task) -> list[dict[str, Any]]:
    """LightlyTrain's `predict`, without a score threshold."""
    import numpy as np
    import torch
    from pycocotools import mask as coco_mask

    lightly_train = _package()
    torch.set_num_threads(1)
    model = lightly_train.load_model(Path(task.folder, "run", "exported_models", "exported_last.pt"), device="cpu")
    results = []
    for image in task.annotations("valid")["images"]:
        found = model.predict(str(task.image("valid", image)), threshold=0.0)
        for label, mask, score in zip(found["labels"], found["masks"], found["scores"], strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
            results.append(
                {
                    "image_id": image["id"], "category_id": int(label), "score": float(score),
                    "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
                }
            )  # fmt: skip
    return results


if __name__ == "__main__":
    serve(train, predict)
