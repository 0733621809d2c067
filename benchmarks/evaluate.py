"""From logits to run lengths, ours against transformers' post-processing and pycocotools' encoder.

python -m benchmarks.evaluate
"""

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from benchmarks.measure import alternate, parser, report
from m2f_trainer.evaluation.instances import to_instances

PADDED, RESIZED, LOGITS = (800, 1088), (800, 1067), (200, 272)
CLASSES = 80


def main() -> None:
    """Measure the two sizes, and print them."""
    made = parser(__doc__ or "")
    made.add_argument("--queries", type=int, default=100)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--size", nargs="+", default=["480x640", "1536x2048"], help="HEIGHTxWIDTH of the image")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    rows = [measure(arguments, tuple(map(int, size.split("x")))) for size in arguments.size]
    report("Logits to COCO run lengths, one image", rows, arguments)


def measure(arguments: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """One row."""
    classes, masks = (tensor.to(arguments.device) for tensor in logits(arguments.queries))
    output = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    processor = Mask2FormerImageProcessorPil()

    def stock() -> int:
        found = processor.post_process_instance_segmentation(
            output, threshold=0.0, target_sizes=[size], return_binary_maps=True
        )[0]["segmentation"]
        columns = np.asfortranarray(found.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
        return len(coco_mask.encode(columns))

    def ours() -> int:
        return len(
            to_instances(
                classes, masks, image_ids=[0], original_sizes=[(size[0], size[1])], resized_sizes=[RESIZED],
                padded_size=PADDED, category_ids=list(range(CLASSES)),
            )[0]
        )  # fmt: skip

    seconds = alternate({"stock": stock, "ours": ours}, arguments.repeats, arguments.device)
    clock = "cpu" if arguments.device == "cpu" else "wall"
    return {
        "height x width": f"{size[0]}x{size[1]}",
        "queries": arguments.queries,
        **{f"{name} {kind} s": seconds[name][kind] for name in ("ours", "stock") for kind in ("cpu", "wall")},
        "ratio": seconds["stock"][clock] / seconds["ours"][clock],
    }


def logits(queries: int) -> tuple[Tensor, Tensor]:
    """Class logits (1, Q, K + 1) and mask logits (1, Q, h, w): blobs of 2 to 60 cells, an empty mask now and then."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(LOGITS[0]), torch.arange(LOGITS[1]), indexing="ij")
    masks = []
    for query in range(queries):
        centre_y, centre_x, spread = torch.rand(3, generator=generator).tolist()
        radius = 0.0 if query % 16 == 0 else 1 + 29 * spread**2
        distance = torch.hypot(y - centre_y * LOGITS[0], x - centre_x * LOGITS[1])
        rough = torch.randn(1, 1, LOGITS[0] // 8, LOGITS[1] // 8, generator=generator)
        noise = functional.interpolate(rough, size=LOGITS, mode="bilinear")[0, 0]
        masks.append((radius - distance).clamp(-8, 8) + 0.5 * noise)
    classes = torch.randn(1, queries, CLASSES + 1, generator=generator)
    return classes, torch.stack(masks).unsqueeze(0)


if __name__ == "__main__":
    main()
