"""Run an exported model with only numpy, Pillow and a runtime: python predict_exported.py model.onnx IMAGE [...]

The runtime is onnxruntime for model.onnx, openvino for model.xml, torch for model.pt2 and model.aoti.pt2.
Prints one JSON line per instance and writes IMAGE.instances.png. model.json describes the steps."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def open_network(path, constants):
    """A function of pixels (1, 3, H, W) and mask (1, H, W) that returns the logits of the classes and of the masks."""
    if path.suffix == ".xml":
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", constants["compile_options"])
        return lambda pixels, mask: compiled([pixels, mask], share_outputs=False).to_tuple()
    if path.suffix == ".pt2":
        import torch
        from torch._inductor import aoti_load_package

        compiled = path.name.endswith(".aoti.pt2")
        program = aoti_load_package(str(path)) if compiled else torch.export.load(path).module()
        return torch.no_grad()(lambda *inputs: [one.numpy() for one in program(*map(torch.from_numpy, inputs))])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    return lambda pixels, mask: session.run(None, {"pixel_values": pixels, "pixel_mask": mask})


def read_rgb(path, pixel_range):
    """The image as viewers show it, as 8-bit RGB; grey values of more than 8 bits are scaled from `pixel_range`."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":
        values = np.asarray(image).astype(np.float64)
        low, high = np.quantile(values, (0.001, 0.999)) if pixel_range == "image" else pixel_range or (0, 65535)
        scaled = np.rint(np.clip((values - low) * 255 / max(high - low, 1e-30), 0, 255))
        image = Image.fromarray(scaled.astype(np.uint8))
    return image.convert("RGB")


def prepare(image, height, width):
    """The image within the network's frame: pixels (1, 3, H, W), mask (1, H, W), and its (h, w) in the frame."""
    scale = min(height / image.height, width / image.width)
    h, w = (max(1, min(side, round(old * scale))) for side, old in ((height, image.height), (width, image.width)))
    pixels, mask = np.zeros((1, 3, height, width), np.uint8), np.zeros((1, height, width), bool)
    pixels[0, :, :h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    mask[0, :h, :w] = True
    return pixels, mask, (h, w)


def resize(values, size):
    """(n, m) floats, bilinearly to `size`: half-pixel centres, edges repeated, no antialias."""
    for axis, (old, new) in enumerate(zip(values.shape, size, strict=True)):
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        share = np.expand_dims((place - low).astype(np.float32), 1 - axis)
        values = values.take(low, axis) * (1 - share) + values.take(np.minimum(low + 1, old - 1), axis) * share
    return values


def predict(network, constants, image):
    """Yields (category, score, mask (H, W)) of the instances above their class's threshold, likeliest class first."""
    before, after = constants["preprocessing"], constants["postprocessing"]
    frame = before["image_height"], before["image_width"]
    pixels, mask, (h, w) = prepare(image, *frame)
    classes, masks = network(pixels, mask)
    odds = np.exp(classes[0] - classes[0].max(1, keepdims=True))
    pairs = (odds / odds.sum(1, keepdims=True))[:, :-1]  # the last column is no object
    best = np.argsort(-pairs, axis=None)[: after["top_k"]]
    for query, label in np.transpose(np.unravel_index(best, pairs.shape)):
        if pairs[query, label] <= (lowest := after["thresholds"][label]):
            continue
        logits = resize(resize(masks[0, query], frame)[:h, :w], (image.height, image.width))
        inside = logits > after["mask_threshold"]
        if inside.any() and (score := pairs[query, label] * (1 / (1 + np.exp(-logits[inside]))).mean()) > lowest:
            yield after["categories"][label], float(score), inside


if __name__ == "__main__":
    model = Path(sys.argv[1])
    constants = json.loads(model.with_name("model.json").read_text())
    network = open_network(model, constants)
    for path in map(Path, sys.argv[2:]):
        pixels = np.array(image := read_rgb(path, constants["preprocessing"]["pixel_range"]))
        for number, (category, score, inside) in enumerate(predict(network, constants, image)):
            print(json.dumps({"file": str(path), **category, "score": round(score, 4), "pixels": int(inside.sum())}))
            pixels[inside] = pixels[inside] // 2 + np.random.default_rng(number).integers(0, 128, 3, np.uint8)
        Image.fromarray(pixels).save(path.with_suffix(".instances.png"))
