"""The model card: what was trained on what, how well it does, how to use it with and without us, and its licences.

Names of datasets and categories come from strangers' files, so they are escaped before they enter Markdown; the
metadata goes through huggingface_hub's YAML writer. A card ends with its own digest: one that no longer fits it was
changed by hand, and is kept.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData

from m2f_trainer.config.recipe import GROUPS, rows
from m2f_trainer.data.dataset import Category
from m2f_trainer.errors import SharingError
from m2f_trainer.evaluation.gallery import pictures
from m2f_trainer.hub.licences import DINOV3, Origin, licence_chain, licence_fields
from m2f_trainer.hub.markdown import code, escape, percent, table, without_folders
from m2f_trainer.run_folder import read_details, read_json

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
PICTURES = "pictures"
"""The folder of a card's pictures. They show the dataset, so they are uploaded only where that was asked for."""

DRAWN, LONGEST = 3, 480
KINDS = {
    "class": "another class",
    "localisation": "badly outlined",
    "both": "another class and badly outlined",
    "duplicate": "found twice",
    "background": "nothing there",
    "missed": "missed",
}


def results(metrics: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """COCO figures of each split in percent, then each class, then the errors."""
    rows = [
        [split, *(percent(metrics.get(prefix + key, -1)) for key in COLUMNS)]
        for prefix, split in SPLITS.items()
        if f"{prefix}map" in metrics
    ]
    if not rows:
        return []
    told = "COCO AP in percent, at the images' original size, against the untouched annotations:"
    return ["## Results", "", told, "", *table(["split", *COLUMNS.values()], rows), *classes(metrics, details)]


def classes(metrics: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """Mask AP of each class, best first; with the details of the valid split where they are there."""
    shares = {
        split: {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
        for prefix, split in SPLITS.items()
        if (start := f"{prefix}map_class/")
    }
    given = {split: values for split, values in shares.items() if values}
    if not given:
        return []
    rows = {row["name"]: row for row in details.get("classes", [])}
    head = ["class", *(f"mask AP ({split})" for split in given)]
    head += ["objects (valid)", "AP50", "best threshold", "precision there", "recall there"] if rows else []
    names = dict.fromkeys(name for values in given.values() for name in values)
    first = next(reversed(given.values()))
    ranked = sorted(names, key=lambda name: -first.get(name, -1))
    cells = [
        [escape(name), *(percent(values.get(name, -1)) for values in given.values()), *more(rows.get(name), bool(rows))]
        for name in ranked
    ]
    return table(head, cells)


def more(row: Mapping[str, Any] | None, wanted: bool) -> list[str]:
    """What is known of a class beside its AP; a class at whose best threshold nothing is kept has no threshold."""
    if not wanted:
        return []
    if row is None:
        return ["-"] * 5
    kept = [f"{row['threshold']:.2f}", percent(row["precision"]), percent(row["recall"])] if row["kept"] else ["-"] * 3
    return [str(row["objects"]), percent(row["ap50"]), *kept]


def errors(details: Mapping[str, Any]) -> list[str]:
    """What mending each kind of error alone would bring, as TIDE counts it."""
    kinds = details.get("errors", {})
    there = [one for one in KINDS if kinds.get(one, {}).get("count")]
    ranked = sorted(there, key=lambda kind: -kinds[kind]["cost"])
    rows = [[KINDS[one], str(kinds[one]["count"]), f"{100 * kinds[one]['cost']:.1f}"] for one in ranked]
    if not rows:
        return []
    told = "Errors on the valid split at IoU 0.5, and the AP50 in points that mending one kind alone would bring:"
    return [told, "", *table(["error", "how many", "cost"], rows)]


def draw_pictures(folder: Path, dataset: Dataset, details: Mapping[str, Any]) -> list[Path]:
    """Write the worst and the best images with truth beside prediction into the folder's `pictures/`; return them.

    Raises ImageError where an image can't be read.
    """
    categories = [Category(row["id"], row["name"]) for row in details.get("classes", [])]
    written = []
    for kind, entries in details.get("shown", {}).items():
        (folder / PICTURES).mkdir(exist_ok=True)
        for number, (_, image, _) in enumerate(pictures(dataset, entries[:DRAWN], categories, LONGEST), 1):
            written.append(folder / PICTURES / f"{kind}_{number}.jpg")
            image.save(written[-1], "JPEG", quality=85)
    return written


def gallery(folder: Path) -> list[str]:
    """The pictures that `draw_pictures` wrote, with what each shows."""
    shown: Mapping[str, Sequence[Mapping[str, Any]]] = read_details(folder).get("shown", {})
    lines = [
        line for kind, title in (("worst", "Worst"), ("best", "Best")) for line in _row(folder, kind, title, shown)
    ]
    head = ["## Pictures", "", "Images of the valid split: the truth on the left, the prediction on the right.", ""]
    return [*head, *lines] if lines else []


def _row(folder: Path, kind: str, title: str, shown: Mapping[str, Any]) -> Iterator[str]:
    for number, one in enumerate(shown.get(kind, [])[:DRAWN], 1):
        name = f"{PICTURES}/{kind}_{number}.jpg"
        if (folder / name).is_file():
            told = f"{one['found']} found, {one['wrong']} wrong, {one['missed']} missed"
            yield from (f"{title} {number}: {told}", "", f"![{title} {number}: {told}]({name})", "")


LOCAL_THEMES = (
    "checkpoints and resumption", "machine", "logs and uploads", "fixed or derived (not to be set)"
)  # fmt: skip
LOCAL_FIELDS = {
    "dataloader_pin_memory", "hub_revision", "hub_private_repo", "accelerator_config", "run_name", "project",
    "disable_tqdm", "logging_dir", "do_eval", "dataloader_prefetch_factor", "include_for_metrics",
}  # fmt: skip
"""Fields of transformers that, like those of LOCAL_THEMES, do not affect the model."""

GIBIBYTE = 2**30


def record(recipe: Mapping[str, Any], state: Mapping[str, Any], facts: Mapping[str, Any], dataset: str) -> list[str]:
    """The section on training; what a folder doesn't tell is left out.

    Args:
        state: trainer_state.json.
        facts: fingerprint.json.
        dataset: its name, of strangers.
    """
    lines = [*data_lines(facts, dataset), *cost_lines(state)]
    chosen = chosen_fields(recipe)
    shown = ["<details><summary>The recipe</summary>", "", *code(chosen), "", "</details>", ""] if chosen else []
    return ["## Training", "", *lines, *([""] if lines else []), *shown] if lines or shown else []


def data_lines(facts: Mapping[str, Any], dataset: str) -> Iterator[str]:
    """Which data, told by digests that anyone who has it can compare."""
    if facts:
        images = "streamed images" if facts.get("train_images") is None else f"{facts['train_images']:,} images"
        yield f"- Data: {escape(dataset)}, {images} to train on"
        for split, key in (("train", "train_data"), ("valid", "valid_data")):
            yield f"- Fingerprint of the {split} annotations (SHA-256): `{escape(str(facts.get(key)), code=True)}`"


def cost_lines(state: Mapping[str, Any]) -> Iterator[str]:
    """Steps, time, hardware and software, as `training.cost` keeps them."""
    if state:
        yield f"- Length: {state['global_step']:,} steps, {state['epoch'] or 0:.1f} epochs"
    cost = state.get("stateful_callbacks", {}).get("Cost", {}).get("attributes")
    if cost:
        yield f"- Time: {duration(cost['seconds'])}, evaluations included"
        memory = f"peak memory of a process {cost['peak_memory'] / GIBIBYTE:.1f} GiB"
        yield f"- Hardware: {cost['processes']} x {escape(cost['hardware'])}; {memory}"
        yield f"- Software: {escape(cost['software'])}"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def chosen_fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of the fields that make the model: those this package names, and others that were set."""
    kept = []
    for one in (one for group in GROUPS for one in fields(group) if one.init and one.name not in LOCAL_FIELDS):
        row, value = rows().get(one.name), recipe.get(one.name)
        affects_model = row.theme not in LOCAL_THEMES if row else value != one.default
        if affects_model and value not in (None, []):
            kept.append(one.name)
    return without_folders({name: recipe[name] for name in kept})
