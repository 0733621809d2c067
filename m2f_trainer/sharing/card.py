"""The model card: what was trained on what, how well it does, how to use it with and without us, and its licences.

Names of datasets and categories come from strangers' files, so they are escaped before they enter Markdown; the
metadata goes through huggingface_hub's YAML writer. A card ends with its own digest: one that no longer fits it was
changed by hand, and is kept.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from m2f_trainer.errors import SharingError
from m2f_trainer.evaluation.curves import read_details
from m2f_trainer.evaluation.runs import read_json
from m2f_trainer.sharing.licences import DINOV3, Origin, licence_chain, licence_fields
from m2f_trainer.sharing.markdown import escape, table
from m2f_trainer.sharing.record import record
from m2f_trainer.sharing.results import COLUMNS, SPLITS, errors, gallery, results

CARD = "README.md"
FEW = 20  # objects of a class, below which chance decides its figures
SIGNATURE = "<!-- written by m2f_trainer, and written anew at each upload unless you change it: {} -->\n"


@dataclass(frozen=True)
class Form:
    """What a card is for: `model_id` is what its examples load (by default the folder); the other two as `Target`."""

    model_id: str | None = None
    pictures: bool = False
    adapter_only: bool = False


def write_card(folder: str | Path, form: Form | None = None) -> Path:
    """Write README.md into a model's folder from the files beside it. Raises SharingError where there is no model."""
    path = Path(folder, CARD)
    path.write_text(render_card(Path(folder), form), encoding="utf-8")
    return path


def render_card(folder: Path, form: Form | None = None) -> str:
    """The text of the card."""
    config, form = read_json(folder / "config.json"), form or Form()
    if not config:
        raise SharingError(f"{folder} holds no model: expected config.json there. Give a run's folder or a checkpoint.")
    recipe, metrics, details = (
        read_json(folder / "recipe.json"),
        read_json(folder / "metrics.json"),
        read_details(folder),
    )
    dataset = Path(str(recipe.get("dataset_name") or "a COCO dataset")).name
    chain = licence_chain(config)
    lines = [
        "---",
        metadata(config, metrics, dataset, chain).to_yaml().strip(),
        "---",
        "",
        *introduction(config, recipe, dataset),
        *results(metrics, details),
        *errors(details),
        *(gallery(folder) if form.pictures else []),
        *usage(escape(form.model_id or folder.resolve().name, code=True), form.adapter_only),
        *record(recipe, read_json(folder / "trainer_state.json"), read_json(folder / "fingerprint.json"), dataset),
        *limits(config, details, dataset),
        *licences(chain),
    ]
    text = "\n".join(lines)
    return text + SIGNATURE.format(digest_of(text))


def digest_of(text: str) -> str:
    """Enough of a SHA-256 to notice a change."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_untouched(card: str) -> bool:
    """Whether a card is as it was written here."""
    text, _, _ = card.rpartition(SIGNATURE.partition("{}")[0])
    return card == text + SIGNATURE.format(digest_of(text))


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
    classes = f"{len(names)} class{'' if len(names) == 1 else 'es'}"
    built = ["", "Built with DINOv3."] if any(one.licence == DINOV3 for one in licence_chain(config)) else []
    return [
        f"# Mask2Former on {escape(backbone)}",
        "",
        f"Instance segmentation of {classes}, fine-tuned on {escape(dataset)} with m2f\\_trainer.",
        *built,
        "",
        f"- Classes: {shown or 'see config.json'}",
        f"- Input: {config.get('image_height')} x {config.get('image_width')}, aspect kept, padded",
        f"- Neck: {config.get('neck')}; queries: {config.get('num_queries')}; tuned: {recipe.get('tune', 'unknown')}",
        "",
    ]


def usage(model: str, adapter_only: bool) -> list[str]:
    """How to use the model, with our package and without it; of an adapter alone, how to put it on its backbone."""
    if adapter_only:
        return ["## Use", "", *ADAPTER_USE.format(model=model).splitlines(), ""]
    return ["## Use", "", *MODEL_USE.format(model=model).splitlines(), ""]


MODEL_USE = """\
With m2f\\_trainer (images of any size; COCO results with the dataset's own category ids):

```bash
pip install m2f-trainer
m2f predict {model} photos/
```

```python
from m2f_trainer import Predictor

(found,) = Predictor.from_pretrained("{model}")(["photo.jpg"], threshold=0.5)
```

With transformers alone (the folder carries the model's code; read it before you trust it):

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{model}", trust_remote_code=True)
segment("photo.jpg", subtask="instance")
```

The pipeline's own post-processing resizes masks to 384 x 384, so its outlines are coarser than the figures above."""

ADAPTER_USE = """\
These are a LoRA adapter, the neck and the head; the backbone's own weights are fetched from where they came from:

```python
from pathlib import Path

from huggingface_hub import snapshot_download
from m2f_trainer import Predictor
from m2f_trainer.model.adapters import load_adapter

predictor = Predictor(load_adapter(Path(snapshot_download("{model}"))))
(found,) = predictor(["photo.jpg"], threshold=0.5)
```"""


def limits(config: Mapping[str, Any], details: Mapping[str, Any], dataset: str) -> list[str]:
    """What the model can't do, as far as that follows from how it was made and measured."""
    return [
        "## Limits",
        "",
        f"- It knows the classes above alone, as {escape(dataset)} shows them; on other images it was not measured.",
        f"- It finds at most {config.get('num_queries')} objects in an image; larger or denser ones go in tiles "
        "(`m2f predict --tile`).",
        *measured_limits(details),
        "",
    ]


def measured_limits(details: Mapping[str, Any]) -> Iterator[str]:
    """What its own evaluation says against it."""
    calibrated = details.get("calibration", {}).get("error")
    off = "" if calibrated is None else f" (they are {100 * calibrated:.0f} points off on average)"
    yield f"- Scores rank predictions; they are no probabilities{off}. Choose a threshold on your own images."
    if details.get("images"):
        yield f"- The figures of the valid split are of {len(details['images']):,} images and one training run."
    few = [row["name"] for row in details.get("classes", []) if row["objects"] < FEW]
    if few:
        named = ", ".join(escape(name) for name in few[:10]) + (", ..." if len(few) > 10 else "")
        yield f"- Fewer than {FEW} objects to measure on, so that their figures say little: {named}."


def named(source: str) -> str:
    """A Hub id as it is; of a folder its own name alone: the world need not know where it lies."""
    return Path(source).name if Path(source).is_absolute() else source


def licences(chain: list[Origin]) -> list[str]:
    """The licence chain as a table."""
    rows = [[escape(named(one.source)), one.licence or "its own", one.duty] for one in chain]
    start = table(["the weights started from", "licence", "what it asks"], rows)
    return [
        "## Licences",
        "",
        *(start if rows else ["The weights started from random numbers.", ""]),
        "The code in this folder is Apache-2.0. The dataset's own terms apply to what was trained on it.",
        "",
    ]
