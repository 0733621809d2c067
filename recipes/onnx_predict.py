"""Runs an exported model with onnxruntime, numpy and Pillow alone: python onnx_predict.py model.onnx IMAGE [...]

Prints one JSON line an instance, and writes IMAGE.instances.png with the masks tinted. What is done to the image before
the network, and to its logits after it, is in the model.json that `m2f export` writes beside the ONNX file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

THRESHOLD = 0.5


def prepare(image, height, width):
    """The image within the network's frame: pixels (1, 3, H, W), mask (1, H, W), and its (h, w) in the frame."""
    scale = min(height / image.height, width / image.width)
    h, w = max(1, min(height, round(image.height * scale))), max(1, min(width, round(image.width * scale)))
    pixels, mask = np.zeros((1, 3, height, width), np.uint8), np.zeros((1, height, width), bool)
    pixels[0, :, :h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    mask[0, :h, :w] = True
    return pixels, mask, (h, w)


def resize(values, size):
    """(n, m) floats, bilinearly to `size`: half-pixel centres, edges repeated, no antialias."""
    for axis, (old, new) in enumerate(zip(values.shape, size, strict=True)):
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        share = (place - low).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        values = values.take(low, axis) * (1 - share) + values.take(np.minimum(low + 1, old - 1), axis) * share
    return values


def predict(session, constants, image):
    """Yields (category, score, mask (H, W)) of the instances above the threshold, best class probability first."""
    before, after = constants["preprocessing"], constants["postprocessing"]
    frame = before["image_height"], before["image_width"]
    pixels, mask, (h, w) = prepare(image, *frame)
    classes, masks = session.run(None, {"pixel_values": pixels, "pixel_mask": mask})
    odds = np.exp(classes[0] - classes[0].max(1, keepdims=True))
    pairs = (odds / odds.sum(1, keepdims=True))[:, :-1]  # the last column is no object
    for pair in np.argsort(-pairs, axis=None)[: after["top_k"]]:
        query, label = np.unravel_index(pair, pairs.shape)
        if pairs[query, label] <= THRESHOLD:  # the score is at most this
            return
        logits = resize(resize(masks[0, query], frame)[:h, :w], (image.height, image.width))
        inside = logits > after["mask_threshold"]
        score = pairs[query, label] * (1 / (1 + np.exp(-logits[inside]))).mean() if inside.any() else 0
        if score > THRESHOLD:
            yield after["categories"][label], float(score), inside


if __name__ == "__main__":
    model, *images = map(Path, sys.argv[1:])
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    constants = json.loads(model.with_name("model.json").read_text())
    for path in images:
        image = Image.open(path).convert("RGB")
        pixels = np.asarray(image).copy()
        for number, (category, score, inside) in enumerate(predict(session, constants, image)):
            ys, xs = np.nonzero(inside)
            box = [int(value) for value in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
            print(json.dumps({"file": str(path), **category, "score": round(score, 4), "box": box}))
            pixels[inside] = pixels[inside] // 2 + np.random.default_rng(number).integers(0, 128, 3, np.uint8)
        Image.fromarray(pixels).save(path.with_suffix(".instances.png"))
