"""Run an exported model with only numpy, Pillow and a runtime: python predict_exported.py model.onnx IMAGE [...]

The runtime is onnxruntime for model.onnx, openvino for model.xml, torch for model.pt2 and model.aoti.pt2.
Prints one JSON line per instance and writes IMAGE.instances.png beside it. model.json describes the steps.
A service for a model without `tiles` in model.json needs nothing that follows `predict`."""

import argparse
import json
import math
import os
import sys
from itertools import chain, combinations, pairwise, product
from pathlib import Path
from typing import NamedTuple

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


def prepare(image, frame, scale):
    """The scaled image within the network's frame: pixels (1, 3, H, W), mask (1, H, W), and its (h, w) in the frame."""
    h, w = (max(1, min(side, round(old * scale))) for side, old in zip(frame, (image.height, image.width), strict=True))
    pixels, mask = np.zeros((1, 3, *frame), np.uint8), np.zeros((1, *frame), bool)
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


def find(network, constants, image, frame, lowest, scale):
    """Yields (class, score, mask (H, W)) of the instances of a class above `lowest`, likeliest class first."""
    after = constants["postprocessing"]
    pixels, mask, (h, w) = prepare(image, frame, scale)
    classes, masks = network(pixels, mask)
    odds = np.exp(classes[0] - classes[0].max(1, keepdims=True))
    pairs = (odds / odds.sum(1, keepdims=True))[:, :-1]  # the last column is no object
    best = np.argsort(-pairs, axis=None)[: after["top_k"]]
    for query, label in np.transpose(np.unravel_index(best, pairs.shape)):
        if pairs[query, label] <= lowest:
            return
        logits = resize(resize(masks[0, query], frame)[:h, :w], (image.height, image.width))
        inside = logits > after["mask_threshold"]
        if inside.any():
            yield label, float(pairs[query, label] * (1 / (1 + np.exp(-logits[inside]))).mean()), inside


def predict(network, constants, image):
    """Yields (category, score, mask (H, W)) of the instances above their class's threshold."""
    before, after, tiles = constants["preprocessing"], constants["postprocessing"], constants["tiles"]
    frame, lowest = (before["image_height"], before["image_width"]), min(after["thresholds"])
    if tiles:
        found = find_in_tiles(network, constants, image, frame, lowest, tiles)
    else:
        found = find(network, constants, image, frame, lowest, min(frame[0] / image.height, frame[1] / image.width))
    for label, score, inside in found:
        if score > after["thresholds"][label]:
            yield after["categories"][label], score, inside


class Tile(NamedTuple):
    """Boxes (x0, y0, x1, y1) in the image: tiles overlap, and their cores partition the image."""

    box: tuple
    core: tuple


class Piece(NamedTuple):
    """An instance of tile number `tile`, with its box in the image and its mask (y1 - y0, x1 - x0) in the box."""

    tile: int
    label: int
    score: float
    box: tuple
    mask: np.ndarray
    area: int


def find_in_tiles(network, constants, image, frame, lowest, rules):
    """As `find`, for an image that is predicted in tiles; best first."""
    size, pieces = (image.height, image.width), []
    tiles = lay_tiles(size, rules["side"], rules["overlap"])
    lowest, scale = min(lowest, rules["candidates"]), min(frame) / rules["side"]
    for number, (tile, _) in enumerate(tiles):
        for label, score, inside in find(network, constants, image.crop(tile), frame, lowest, scale):
            y, x = (np.flatnonzero(inside.any(axis)).tolist() for axis in (1, 0))
            mask = inside[y[0] : y[-1] + 1, x[0] : x[-1] + 1].copy()
            box = (tile[0] + x[0], tile[1] + y[0], tile[0] + x[-1] + 1, tile[1] + y[-1] + 1)
            pieces.append(Piece(number, label, score, box, mask, np.count_nonzero(mask)))
    for piece in merge(pieces, tiles, size, rules):
        inside = np.zeros(size, bool)
        inside[piece.box[1] : piece.box[3], piece.box[0] : piece.box[2]] = piece.mask
        yield piece.label, piece.score, inside


def lay_tiles(size, side, overlap):
    """The tiles of an image of `size` (height, width), row by row."""
    lines = []
    for length in size:
        extent = min(side, length)
        shared = min(extent - 1, math.ceil(side * overlap))
        count = max(1, math.ceil((length - shared) / (extent - shared)))
        starts = [round(k * (length - extent) / max(1, count - 1)) for k in range(count)]
        cuts = [0, *((start + extent + following) // 2 for start, following in pairwise(starts)), length]
        lines.append([(start, start + extent, *core) for start, core in zip(starts, pairwise(cuts), strict=True)])
    return [Tile((x[0], y[0], x[1], y[1]), (x[2], y[2], x[3], y[3])) for y, x in product(*lines)]


def merge(pieces, tiles, size, rules):
    """The objects, best first, of an image of `size` (height, width) whose tiles show these pieces of them."""
    of_tile = [[] for _ in tiles]
    for piece in best_first(pieces):
        add(of_tile[piece.tile], piece, rules)
    objects, cut = [], []
    for piece in best_first(chain(*of_tile)):
        if is_cut(piece.box, tiles[piece.tile].box, size):
            cut.append(piece)
        else:
            add(objects, piece, rules)
    groups = group([piece for piece in cut if not is_covered(piece, objects, rules)], tiles, rules)
    stitched = (stitch(members, tiles) for members in groups if len(members) > 1)
    for piece in best_first(piece for piece in stitched if piece.area):
        add(objects, piece, rules)
    for piece in best_first(members[0] for members in groups if len(members) == 1):
        in_core = np.count_nonzero(part(piece, tiles[piece.tile].core))
        if 2 * in_core >= piece.area and not is_covered(piece, objects, rules):
            add(objects, piece._replace(score=rules["cut_score"] * piece.score), rules)
    return best_first(objects)


def best_first(pieces):
    return sorted(pieces, key=lambda piece: -piece.score)


def add(objects, piece, rules):
    """Add a piece, unless it is the same object as one that is already there."""
    for other in objects:
        common = shared(piece, other)
        if common > rules["same_object"] * (piece.area + other.area - common):
            return
    objects.append(piece)


def is_covered(piece, objects, rules):
    """Whether the piece is a part of one of the objects."""
    return any(shared(piece, other) > rules["covered"] * piece.area for other in objects)


def is_cut(box, tile, size):
    """Whether a box touches an edge of its tile that isn't the image's."""
    before = any(box[axis] <= tile[axis] > 0 for axis in (0, 1))
    return before or box[2] >= tile[2] < size[1] or box[3] >= tile[3] < size[0]


def meet(*boxes):
    """The intersection of boxes; where there is none, a box without width or height."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    left, top = max(x0), max(y0)
    return left, top, max(left, min(x1)), max(top, min(y1))


def part(piece, box):
    """The piece's mask where its box meets another."""
    (x0, y0, x1, y1), (left, top, _, _) = meet(piece.box, box), piece.box
    return piece.mask[y0 - top : y1 - top, x0 - left : x1 - left]


def shared(first, second, *boxes):
    """The number of pixels that two pieces of one class share, inside the boxes."""
    (x0, y0, x1, y1), (left, top, right, bottom) = first.box, second.box
    if x0 >= right or x1 <= left or y0 >= bottom or y1 <= top or first.label != second.label:
        return 0  # most pairs
    box = meet(first.box, second.box, *boxes)
    return np.count_nonzero(part(first, box) & part(second, box))


def group(pieces, tiles, rules):
    """Groups of pieces that form one object, at most one of each tile: the pieces that agree best are joined first."""
    across = sum(tile.box[1] == 0 for tile in tiles)  # tiles of a row
    steps = {1, across - 1, across, across + 1} - {0}  # from a tile to those beside it, in the order of the tiles
    pieces, pairs = sorted(pieces, key=lambda piece: piece.tile), []
    for (a, first), (b, second) in combinations(enumerate(pieces), 2):
        if second.tile - first.tile in steps:
            overlap = meet(tiles[first.tile].box, tiles[second.tile].box)
            common = shared(first, second, overlap)
            total = np.count_nonzero(part(first, overlap)) + np.count_nonzero(part(second, overlap)) - common
            if common > rules["same_object"] * total:
                pairs.append((-common / total, first.tile, second.tile, a, b))
    groups = [[number] for number in range(len(pieces))]  # the group of each piece
    for *_, a, b in sorted(pairs):
        if {pieces[k].tile for k in groups[a]}.isdisjoint(pieces[k].tile for k in groups[b]):
            joined = groups[a] + groups[b]
            for k in joined:
                groups[k] = joined
    return [[pieces[k] for k in members] for number, members in enumerate(groups) if number == min(members)]


def stitch(pieces, tiles):
    """One object: each piece's mask in the core of its tile; the mean score, weighted by the pixels of each there."""
    boxes = np.array([piece.box for piece in pieces])
    x0, y0, x1, y1 = *boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist()
    mask, areas = np.zeros((y1 - y0, x1 - x0), bool), []
    for piece in pieces:
        left, top, right, bottom = box = meet(piece.box, tiles[piece.tile].core)
        mask[top - y0 : bottom - y0, left - x0 : right - x0] = part(piece, box)
        areas.append(np.count_nonzero(part(piece, box)))
    score = sum(area * piece.score for area, piece in zip(areas, pieces, strict=True)) / max(1, sum(areas))
    return Piece(-1, pieces[0].label, score, (x0, y0, x1, y1), mask, sum(areas))


def run(model, images):
    described = model.with_name("model.json")
    for path in (model, described, *images):
        if not path.is_file():
            sys.exit(f"{path}: there is no such file")
    constants = json.loads(described.read_text())
    tiles = constants.get("tiles", {})
    if tiles is not None and "candidates" not in tiles:
        sys.exit(f"{model} was exported by an older version, whose `tiles` are incomplete: export the model again")
    network = open_network(model, constants)
    for path in images:
        try:
            pixels = np.array(image := read_rgb(path, constants["preprocessing"]["pixel_range"]))
        except (OSError, ValueError) as error:
            sys.exit(f"{path} can't be read as an image: {error}")
        for number, (category, score, inside) in enumerate(predict(network, constants, image)):
            found = {"file": str(path), **category, "score": round(score, 4), "pixels": int(inside.sum())}
            print(json.dumps(found), flush=True)
            pixels[inside] = pixels[inside] // 2 + np.random.default_rng(number).integers(0, 128, 3, np.uint8)
        picture = path.with_suffix(".instances.png")
        try:
            Image.fromarray(pixels).save(picture)
        except OSError as error:
            sys.exit(f"{picture} can't be written ({error}): copy the image to a folder that you can write to")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the exported file, beside its model.json")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    try:
        run(**vars(parser.parse_args()))
    except BrokenPipeError:  # what reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        sys.exit(141)
