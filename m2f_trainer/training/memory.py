"""How much memory training takes, before it is taken: weights by counting, activations by two small forward passes.

What autograd keeps of an image grows with its area (attention keeps no matrix of all pairs), so a line through two
small sizes gives the large one. Not in it: CUDA's own context, the library's workspaces and what fragmentation costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2f_trainer.model.backbones import stride_of
from m2f_trainer.model.mask2former import M2FModel, backbone_of

ADAM_MOMENTS = 2
LEVERS = (
    "Lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much), image_height and "
    "image_width; or set gradient_checkpointing true, tune lora or frozen, or auto_find_batch_size true"
)


@dataclass(frozen=True)
class Memory:
    """Bytes a device holds while training on one image; `activations` are of each image, the others are there once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    def total(self, images: int) -> int:
        """With so many images at once."""
        return self.weights + self.gradients + self.optimizer + images * self.activations


def estimate(model: M2FModel, instances: int, *, bf16: bool, averaged: bool) -> Memory:
    """The memory that training a model with AdamW takes, at its own image size and with so many instances an image."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.named_parameters()}
    trained = sum(sizes[name] for name, tensor in model.named_parameters() if tensor.requires_grad)
    slots = ADAM_MOMENTS + int(averaged)
    return Memory(sum(sizes.values()), trained, slots * trained, activations(model, instances, bf16))


def activations(model: M2FModel, instances: int, bf16: bool) -> int:
    """Bytes that autograd keeps of one image of the model's size, extrapolated from an eighth and a quarter of it."""
    config = model.config
    stride, sides = stride_of(backbone_of(config)), (config.image_height, config.image_width)
    small = [max(round(side / 8 / stride), 4) * stride for side in sides]
    middle = [max(round(side / 4 / stride), 8) * stride for side in sides]
    first, second = (kept(model, size, instances, bf16) for size in (small, middle))
    area = config.image_height * config.image_width - small[0] * small[1]
    slope = (second - first) / (middle[0] * middle[1] - small[0] * small[1])
    return int(first + slope * area)


def kept(model: M2FModel, size: Sequence[int], instances: int, bf16: bool) -> int:
    """Bytes kept between forward and backward, the parameters aside, of one image (H, W) with so many instances."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    mode, device = model.training, model.device
    model.train()
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        loss = model(**scene(size, instances, device)).loss
    total = sum(found.values())
    del loss
    model.train(mode)
    return total


def scene(size: Sequence[int], instances: int, device: torch.device) -> Mapping[str, object]:
    """A grey image (1, 3, H, W) with objects of a quarter of its sides, in the model's own terms."""
    height, width = size
    masks = torch.zeros(instances, height, width, device=device)
    masks[:, : height // 4, : width // 4] = 1
    return {
        "pixel_values": torch.full((1, 3, height, width), 127, dtype=torch.uint8, device=device),
        "mask_labels": [masks],
        "class_labels": [torch.zeros(instances, dtype=torch.long, device=device)],
    }
