"""Small real runs for tests: the sample dataset, a tiny random model, a few steps on the CPU."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

from m2f_trainer.data.synthetic import write_sample

ROOT = Path(__file__).parents[2]
TINY = {
    "backbone_config": {
        "model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "patch_size": 16,
    },
    "head_config": {
        "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 3,
        "encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2, "train_num_points": 128,
    },
    "tune": "full", "num_queries": 10, "image_height": 64, "image_width": 64, "max_steps": 4, "checkpointing_steps": 2,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 1, "learning_rate": 1e-3, "max_grad_norm": 1.0,
    "dataloader_num_workers": 0, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


def write_tiny(folder: Path, images: tuple[int, int, int] = (4, 3, 2), **fields: object) -> Path:
    """Write a sample dataset (9 images) and a recipe for it; return the recipe."""
    data = write_sample(folder / "data", images=images)
    recipe = folder / "recipe.json"
    given = {**TINY, "dataset_name": str(data), "output_dir": str(folder / "run"), **fields}
    recipe.write_text(json.dumps(given), encoding="utf-8")
    return recipe


def m2f(
    *arguments: object, ranks: int = 0, launcher: str = "torchrun", module: str = "m2f_trainer", timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run `m2f ...` in its own process, or in `ranks` processes."""
    launch = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)],
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(ranks)],
    }[launcher]
    command = [sys.executable, *(launch if ranks else []), "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def write_dense(folder: Path) -> Path:
    """A dataset whose last validation image has 121 objects, more than COCO counts predictions of an image."""
    path = write_sample(folder, images=(1, 2, 0)) / "valid" / "_annotations.coco.json"
    coco = json.loads(path.read_text())
    last = max(image["id"] for image in coco["images"])
    coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] != last] + [
        {
            "id": 1000 + number, "image_id": last, "category_id": coco["categories"][0]["id"], "iscrowd": 0,
            "bbox": [x, y, 3, 3], "area": 9, "segmentation": [[x, y, x + 3, y, x + 3, y + 3, x, y + 3]],
        }
        for number, (x, y) in enumerate(product(range(0, 44, 4), range(0, 44, 4)))
    ]  # fmt: skip
    path.write_text(json.dumps(coco))
    return folder
