"""transformers' instance segmentation example with a DINOv2 backbone: its model, targets, loss and post-processing.

The example (examples/pytorch/instance-segmentation/run_instance_segmentation.py) draws the objects of an image into one
map of instance ids, flips it and changes its colours, resizes it with `Mask2FormerImageProcessor`, trains with the
plain Trainer and scores the output of `post_process_instance_segmentation`. Two things differ here. The score is COCO
AP at original size, as for our models; the example scores against resized annotations. The backbone is a frozen DINOv2,
loaded through `AutoBackbone`, which returns four maps at the patch stride.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.accuracy.stock_parts import postprocessed
from m2f_trainer.data.dataset import categories_of
from m2f_trainer.data.hub_dataset import load_dataset
from m2f_trainer.data.images import open_image
from m2f_trainer.evaluation.evaluator import Evaluator
from m2f_trainer.masks.segmentation import decode
from m2f_trainer.model.backbones import load_pretrained
from m2f_trainer.training.prepare import first_rows

TAPS = ["stage3", "stage6", "stage9", "stage12"]


def stock_model(backbone: Path, classes: int, head: dict[str, Any]) -> Mask2FormerForUniversalSegmentation:
    """transformers' Mask2Former on a frozen DINOv2, with transformers' initialisation of the new layers."""
    vit = AutoConfig.from_pretrained(backbone, out_features=TAPS, local_files_only=True)
    fields = {name: value for name, value in head.items() if not name.startswith("neck")}
    config = Mask2FormerConfig(backbone_config=vit, num_labels=classes, **fields)
    model = Mask2FormerForUniversalSegmentation(config)
    encoder = model.model.pixel_level_module.encoder
    encoder.load_state_dict(load_pretrained(str(backbone), vit).state_dict())
    encoder.requires_grad_(False)
    return model


MOST = 255
"""Objects of an image that are drawn: the processor fails on a map with ids above 255."""


class ExampleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples like those of the example's `augment_and_transform_batch`."""

    def __init__(self, rows: Dataset, processor: Mask2FormerImageProcessorPil, *, augment: bool) -> None:
        self.rows, self.processor, self.augment = rows, processor, augment
        self.classes = {category.id: index for index, category in enumerate(categories_of(rows))}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """pixel_values (3, H, W), mask_labels (N, H, W), class_labels (N,)."""
        row = self.rows[index]
        picture = open_image(row["image"], f"image {row['image_id']}").convert("RGB")
        instances = np.zeros((row["height"], row["width"]), dtype=np.int32)
        classes = {}
        objects = [one for one in row["objects"] if not one["iscrowd"]]
        for number, one in enumerate(objects[:MOST], start=1):
            instances[decode(one["counts"], row["height"], row["width"]) > 0] = number
            classes[number] = self.classes[one["category_id"]]
        if self.augment:
            picture, instances = flip_and_colour(picture, instances)
        made = self.processor(
            [picture], segmentation_maps=[instances], instance_id_to_semantic_id={0: 0, **classes}, return_tensors="pt"
        )
        shown = {"pixel_values": made["pixel_values"][0], "image_id": torch.tensor(row["image_id"])}
        shown["original_size"] = torch.tensor([row["height"], row["width"]])
        masks, labels = made["mask_labels"][0], made["class_labels"][0]
        return {**shown, "mask_labels": masks, "class_labels": labels}


def flip_and_colour(picture: Image.Image, instances: Any) -> tuple[Image.Image, Any]:
    """The example's HorizontalFlip(0.5) and RandomBrightnessContrast(0.5)."""
    if torch.rand(()) < 0.5:
        picture, instances = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), instances[:, ::-1].copy()
    if torch.rand(()) < 0.5:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast):
            picture = kind(picture).enhance(float(torch.empty(()).uniform_(0.8, 1.2)))
    return picture, instances


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The example's: images stacked, labels as lists."""
    labels = {name: [one[name] for one in samples] for name in ("mask_labels", "class_labels")}
    return {"pixel_values": torch.stack([one["pixel_values"] for one in samples]), **labels}


def train_example(
    recipe: dict[str, Any], tiles: Path, backbone: Path, folder: Path, rate: float, seed: int
) -> dict[str, float]:
    """Train like the example: AdamW, constant rate, no weight decay, clipping at 1. Return COCO figures of `valid`."""
    set_seed(seed)
    splits = load_dataset(str(tiles))
    side = int(recipe["image_height"])
    processor = Mask2FormerImageProcessorPil(size={"height": side, "width": side}, ignore_index=0)
    head = {**recipe["head_config"], "num_queries": recipe["num_queries"]}
    model = stock_model(backbone, len(categories_of(splits["train"])), head)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=recipe["max_steps"], learning_rate=rate, lr_scheduler_type="constant",
        per_device_train_batch_size=recipe["per_device_train_batch_size"], remove_unused_columns=False, seed=seed,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=50,
    )  # fmt: skip
    samples = ExampleDataset(splits["train"], processor, augment=True)
    Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collate).train()
    valid = first_rows(splits["valid"], recipe.get("max_eval_samples"))
    return score(model, ExampleDataset(valid, processor, augment=False))


@torch.inference_mode()
def score(model: nn.Module, shown: ExampleDataset) -> dict[str, float]:
    """COCO figures at original size, with the example's post-processing."""
    model.eval()
    categories = [vars(category) for category in categories_of(shown.rows)]
    found = []
    for index in range(len(shown)):
        sample: dict[str, Tensor] = shown[index]
        outputs = model(pixel_values=sample["pixel_values"][None])
        inputs = {name: sample[name][None] for name in ("image_id", "original_size")}
        found += postprocessed(outputs, inputs, categories)
    return {f"eval_{name}": value for name, value in Evaluator(shown.rows)(found).items()}
