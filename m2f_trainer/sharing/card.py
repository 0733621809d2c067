"""The model card: what was trained on what, how well it does, how to use it with and without us, and its licences.

Names of datasets and categories come from strangers' files, so they are escaped before they enter Markdown; the
metadata goes through huggingface_hub's YAML writer.
"""

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from m2f_trainer.errors import SharingError
from m2f_trainer.sharing.licences import DINOV3, Origin, licence_chain, licence_fields

CARD = "README.md"
COLUMNS = {
    "map": "mask AP",
    "map_50": "mask AP50",
    "map_75": "mask AP75",
    "map_small": "small",
    "map_medium": "medium",
    "map_large": "large",
    "box_map": "box AP",
    "boundary_map": "boundary AP",
}
SPLITS = {"eval_": "valid", "test_": "test"}


def write_card(folder: str | Path, model_id: str | None = None) -> Path:
    """Write README.md into a model's folder from its config.json, recipe.json and metrics.json.

    `model_id` is what the examples load; by default the folder. Raises SharingError where there is no model.
    """
    path = Path(folder, CARD)
    path.write_text(render_card(Path(folder), model_id), encoding="utf-8")
    return path


def render_card(folder: Path, model_id: str | None = None) -> str:
    """The text of the card."""
    config = read(folder / "config.json")
    if not config:
        raise SharingError(f"{folder} holds no model: expected config.json there. Give a run's folder or a checkpoint.")
    recipe, metrics = read(folder / "recipe.json"), read(folder / "metrics.json")
    dataset = Path(str(recipe.get("dataset_name") or "a COCO dataset")).name
    chain = licence_chain(config)
    return "\n".join(
        [
            "---",
            metadata(config, metrics, dataset, chain).to_yaml().strip(),
            "---",
            "",
            *introduction(config, recipe, dataset),
            *results(metrics),
            *usage(escape(model_id or folder.resolve().name, code=True)),
            *limits(config, dataset),
            *licences(chain),
        ]
    )


def read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def escape(text: str, code: bool = False) -> str:
    """Text as one harmless line of Markdown; `code` for text inside backticks or a code block."""
    line = re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+", " ", text).strip()[:200]
    if code:
        return re.sub(r"[`\"'\\<>]", "_", line)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:.@-])", r"\\\1", html.escape(line, quote=False))


def metadata(config: Mapping[str, Any], metrics: Mapping[str, Any], dataset: str, chain: list[Origin]) -> ModelCardData:
    """The card's metadata block; figures in model-index form, as shares of 1."""
    backbone = str((config.get("backbone_config") or {}).get("model_type", ""))
    licence = licence_fields(chain)
    bases = [origin.source for origin in chain if re.fullmatch(r"[\w.-]+/[\w.-]+", origin.source)]
    return ModelCardData(
        model_name="m2f_trainer " + str(config.get("backbone_name") or backbone).rsplit("/", 1)[-1],
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["image-segmentation", "instance-segmentation", "mask2former", backbone.split("_")[0], "m2f_trainer"],
        base_model=bases or None,
        metrics=["mean_average_precision"],
        eval_results=list(eval_results(metrics, dataset)) or None,
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )


def eval_results(metrics: Mapping[str, Any], dataset: str) -> Iterator[EvalResult]:
    """One entry a split and figure; figures without any truth (-1) are left out."""
    for prefix, split in SPLITS.items():
        for key, name in COLUMNS.items():
            value = metrics.get(prefix + key, -1)
            if value >= 0:
                yield EvalResult(
                    task_type="image-segmentation",
                    task_name="Instance Segmentation",
                    dataset_type="coco-format",
                    dataset_name=dataset,
                    dataset_split=split,
                    metric_type=key,
                    metric_name=f"COCO {name}",
                    metric_value=round(float(value), 6),
                )


def introduction(config: Mapping[str, Any], recipe: Mapping[str, Any], dataset: str) -> list[str]:
    """Title, one sentence, and the facts of the training."""
    names = [str(category["name"]) for category in config.get("categories") or []]
    backbone = str(config.get("backbone_name") or "a randomly initialised backbone").rsplit("/", 1)[-1]
    shown = ", ".join(escape(name) for name in names[:50]) + (", ..." if len(names) > 50 else "")
    built = ["", "Built with DINOv3."] if any(one.licence == DINOV3 for one in licence_chain(config)) else []
    return [
        f"# Mask2Former on {escape(backbone)}",
        "",
        f"Instance segmentation of {len(names)} classes, fine-tuned on {escape(dataset)} with m2f\\_trainer.",
        *built,
        "",
        f"- Classes: {shown or 'see config.json'}",
        f"- Input: {config.get('image_height')} x {config.get('image_width')}, aspect kept, padded",
        f"- Neck: {config.get('neck')}; queries: {config.get('num_queries')}; tuned: {recipe.get('tune', 'unknown')}",
        "- Everything else about the run: `recipe.json`",
        "",
    ]


def results(metrics: Mapping[str, Any]) -> list[str]:
    """COCO figures of each split in percent, then the mask AP of each class."""
    rows = [
        f"| {split} | " + " | ".join(percent(metrics.get(prefix + key, -1)) for key in COLUMNS) + " |"
        for prefix, split in SPLITS.items()
        if f"{prefix}map" in metrics
    ]
    if not rows:
        return []
    prefix = "test_" if "test_map" in metrics else "eval_"
    start = f"{prefix}map_class/"
    classes = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    return [
        "## Results",
        "",
        "COCO AP in percent, at the images' original size, against the untouched annotations:",
        "",
        "| split | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
        *rows,
        "",
        f"| class ({SPLITS[prefix]}) | mask AP |",
        "|---|---|",
        *(f"| {escape(name)} | {percent(value)} |" for name, value in ranked),
        "",
    ]


def percent(value: float) -> str:
    """A share as percent; "-" where there was no truth."""
    return "-" if value < 0 else f"{100 * value:.1f}"


def usage(model: str) -> list[str]:
    """How to use the model, with our package and without it."""
    return [
        "## Use",
        "",
        "With m2f\\_trainer (images of any size; COCO results with the dataset's own category ids):",
        "",
        "```bash",
        "pip install m2f-trainer",
        f"m2f predict {model} photos/",
        "```",
        "",
        "```python",
        "from m2f_trainer import Predictor",
        "",
        f'predictions = Predictor.from_pretrained("{model}")(["photo.jpg"], threshold=0.5)',
        "```",
        "",
        "With transformers alone (the folder carries the model's code; read it before you trust it):",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'segment = pipeline("image-segmentation", model="{model}", trust_remote_code=True)',
        'segment("photo.jpg", subtask="instance")',
        "```",
        "",
    ]


def limits(config: Mapping[str, Any], dataset: str) -> list[str]:
    """What the model can't do, as far as that follows from how it was made."""
    return [
        "## Limits",
        "",
        f"- It knows the classes above alone, as {escape(dataset)} shows them; on other images it was not measured.",
        f"- It finds at most {config.get('num_queries')} objects in an image.",
        "- Scores rank predictions; they are no probabilities. Choose a threshold on your own validation images.",
        "",
    ]


def licences(chain: list[Origin]) -> list[str]:
    """The licence chain as a table."""
    rows = [f"| {escape(one.source)} | {one.licence or 'its own'} | {one.duty} |" for one in chain]
    start = ["| the weights started from | licence | what it asks |", "|---|---|---|", *rows, ""]
    return [
        "## Licences",
        "",
        *(start if rows else ["The weights started from random numbers.", ""]),
        "The code in this folder is Apache-2.0. The dataset's own terms apply to what was trained on it.",
        "",
    ]
