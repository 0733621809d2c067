"""The model card: training data and settings, metrics, use with and without this package, limits and licences.

The text is the template m2f_trainer/templates/model_card.md. Names of datasets and classes come from untrusted files,
so every value is escaped before it enters Markdown; the metadata is written by huggingface_hub's YAML writer. A card
ends with its own digest: if the digest doesn't match, a user has edited the card, and it is not overwritten.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from m2f_trainer.config.recipe import model_fields
from m2f_trainer.errors import SharingError
from m2f_trainer.evaluation.coco import percent
from m2f_trainer.evaluation.gallery import SHOWN_PICTURES
from m2f_trainer.hub.licences import Origin, licence_chain, licence_fields
from m2f_trainer.hub.markdown import escape, json_block, render_markdown, verbatim, without_folders
from m2f_trainer.model.backbones import DINOV3, IMAGENET
from m2f_trainer.run_folder import PICTURES, blame_damage, read_details, read_json, write_atomically

CARD = "README.md"
SIGNATURE = "<!-- written by m2f_trainer, and written anew at each upload unless you change it: {} -->\n"
FEW_OBJECTS = 20  # figures of a class with fewer objects are mostly chance
GIBIBYTE = 2**30

SPLITS = {"eval_": "valid", "test_": "test"}
METRICS = {
    "map": "mask AP",
    "map_50": "mask AP50",
    "map_75": "mask AP75",
    "map_small": "small",
    "map_medium": "medium",
    "map_large": "large",
    "box_map": "box AP",
    "boundary_map": "boundary AP",
    "unlimited_map": "mask AP, no limit",
}
ERRORS = {
    "class": "wrong class",
    "localisation": "poor outline",
    "both": "wrong class and poor outline",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed",
}


@dataclass(frozen=True)
class CardOptions:
    """The contents of a card that depend on its use.

    Attributes:
        model_id: the model that its examples load; by default the name of the folder.
        pictures: show the images that `draw_pictures` wrote.
        adapter_only: describe an upload of the LoRA adapter, neck and head without the backbone's own weights.
    """

    model_id: str | None = None
    pictures: bool = False
    adapter_only: bool = False


def write_card(folder: str | Path, options: CardOptions | None = None) -> Path:
    """Write README.md into a model's folder from the files beside it. Raises SharingError if there is no model."""
    return write_atomically(Path(folder, CARD), render_card(Path(folder), options))


def render_card(folder: Path, options: CardOptions | None = None) -> str:
    """The text of the card.

    Raises:
        SharingError: the folder holds no model.
        ModelFolderError: a value in its files has a wrong type.
    """
    with blame_damage(folder):
        return _render(folder, options or CardOptions())


def _render(folder: Path, options: CardOptions) -> str:
    config = read_json(folder / "config.json")
    if not config:
        raise SharingError(f"{folder} holds no model: expected config.json there. Give a run's folder or a checkpoint.")
    recipe, metrics, details = (
        read_json(folder / "recipe.json"),
        read_json(folder / "metrics.json"),
        read_details(folder),
    )
    state, fingerprint = read_json(folder / "trainer_state.json"), read_json(folder / "fingerprint.json")
    dataset = Path(str(recipe.get("dataset_name") or "a COCO dataset")).name
    chain = licence_chain(config)
    calibration_error = details.get("calibration", {}).get("error")
    fields_set = without_folders(model_fields(recipe))
    text = render_markdown(
        "model_card.md",
        metadata=verbatim(card_metadata(config, metrics, dataset, chain).to_yaml().strip()),
        backbone=backbone_title(config),
        names=[str(category["name"]) for category in config.get("categories") or []],
        dataset=dataset,
        built_with_dinov3=any(origin.licence == DINOV3 for origin in chain),
        config={key: config.get(key) for key in ("image_height", "image_width", "neck", "num_queries", "tile_size")},
        normalization=normalization_text(config),
        tune=recipe.get("tune", "unknown"),
        results=results_table(metrics),
        dense=any(f"{prefix}unlimited_map" in metrics for prefix in SPLITS),
        classes=classes_table(metrics, details),
        errors=error_rows(details),
        pictures=list(picture_entries(folder, details)) if options.pictures else [],
        adapter_only=options.adapter_only,
        model_id=verbatim(escape(options.model_id or folder.resolve().name, code=True)),
        training=[*data_lines(fingerprint, dataset), *cost_lines(state)],
        recipe=json_block(fields_set) if fields_set else None,
        calibration_error=None if calibration_error is None else f"{100 * calibration_error:.0f}",
        num_images=verbatim(f"{len(details.get('images', [])):,}") if details.get("images") else None,
        rare=[row["name"] for row in details.get("classes", []) if row["objects"] < FEW_OBJECTS],
        rare_limit=FEW_OBJECTS,
        origins=[[source_name(one.source), verbatim(one.licence or "its own"), verbatim(one.duty)] for one in chain],
    )
    return text + SIGNATURE.format(card_digest(text))


def card_digest(text: str) -> str:
    """The first 64 bits of a text's SHA-256: enough to notice an edit."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_untouched(card: str) -> bool:
    """Whether a card is as it was written here."""
    text, _, _ = card.rpartition(SIGNATURE.partition("{}")[0])
    return card == text + SIGNATURE.format(card_digest(text))


# head


def card_metadata(
    config: Mapping[str, Any], metrics: Mapping[str, Any], dataset: str, chain: list[Origin]
) -> ModelCardData:
    """The card's metadata block; figures in model-index form, as shares of 1."""
    architecture = str((config.get("backbone_config") or {}).get("model_type", ""))
    licence = licence_fields(chain)
    bases = [origin.source for origin in chain if re.fullmatch(r"[\w.-]+/[\w.-]+", origin.source)]
    return ModelCardData(
        model_name="m2f_trainer " + str(config.get("backbone_name") or architecture).rsplit("/", 1)[-1],
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["image-segmentation", "instance-segmentation", "mask2former", architecture.split("_")[0], "m2f_trainer"],
        base_model=bases or None,
        metrics=["mean_average_precision"],
        eval_results=list(eval_results(metrics, dataset)) or None,
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )


def eval_results(metrics: Mapping[str, Any], dataset: str) -> Iterator[EvalResult]:
    """One entry for each split and metric; metrics without ground truth (-1) are left out."""
    for prefix, split in SPLITS.items():
        for key, name in METRICS.items():
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


def backbone_title(config: Mapping[str, Any]) -> str:
    """The name of the backbone for the card's title, without folders."""
    architecture = (config.get("backbone_config") or {}).get("model_type", "backbone")
    return str(config.get("backbone_name") or f"a randomly initialised {architecture}").rsplit("/", 1)[-1]


def normalization_text(config: Mapping[str, Any]) -> str:
    """Mean and standard deviation of the channels that images are normalised with."""
    given = (config.get("image_mean") or IMAGENET[0], config.get("image_std") or IMAGENET[1])
    mean, std = (", ".join(f"{float(value):.3f}" for value in values) for values in given)
    return verbatim(f"mean {mean}; standard deviation {std}")


# results


@dataclass(frozen=True)
class MarkdownTable:
    """A Markdown table; its cells are escaped unless they are Markdown already."""

    head: list[str]
    rows: list[list[str]]


def results_table(metrics: Mapping[str, Any]) -> MarkdownTable | None:
    """The COCO metrics of each split, in percent; None where none was scored."""
    shown = [key for key in METRICS if any(prefix + key in metrics for prefix in SPLITS)]
    rows = [
        [split, *(figure(metrics.get(prefix + key)) for key in shown)]
        for prefix, split in SPLITS.items()
        if f"{prefix}map" in metrics
    ]
    return MarkdownTable(["split", *(METRICS[key] for key in shown)], rows) if rows else None


def classes_table(metrics: Mapping[str, Any], details: Mapping[str, Any]) -> MarkdownTable | None:
    """Mask AP of each class, best first, and from the details of the valid split its best threshold."""
    by_split = {
        split: {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
        for prefix, split in SPLITS.items()
        if (start := f"{prefix}map_class/")
    }
    scored = {split: values for split, values in by_split.items() if values}
    if not scored:
        return None
    rows = {row["name"]: row for row in details.get("classes", [])}
    head = ["class", *(f"mask AP ({split})" for split in scored)]
    head += ["objects (valid)", "AP50", "best threshold", "precision there", "recall there"] if rows else []
    names = dict.fromkeys(name for values in scored.values() for name in values)
    ranking = next(reversed(scored.values()))  # the test split where it was scored
    cells = [
        [
            name,
            *(figure(values.get(name)) for values in scored.values()),
            *(class_details(rows.get(name)) if rows else ()),
        ]
        for name in sorted(names, key=lambda name: -ranking.get(name, -1))
    ]
    return MarkdownTable(head, cells)


def class_details(row: Mapping[str, Any] | None) -> list[str]:
    """Objects, AP50, and precision and recall at the best threshold; "-" where a class has no threshold."""
    if row is None:
        return ["-"] * 5
    at_best = [verbatim(f"{row['threshold']:.2f}"), figure(row["precision"]), figure(row["recall"])]
    return [str(row["objects"]), figure(row["ap50"]), *(at_best if row["kept"] else ["-"] * 3)]


def error_rows(details: Mapping[str, Any]) -> list[list[str]]:
    """Error type, count and cost in points of AP50 of TIDE's error types that occur, the most expensive first."""
    errors = details.get("errors", {})
    occurring = [kind for kind in ERRORS if errors.get(kind, {}).get("count")]
    ranked = sorted(occurring, key=lambda kind: -errors[kind]["cost"])
    return [[ERRORS[kind], str(errors[kind]["count"]), figure(errors[kind]["cost"])] for kind in ranked]


def figure(value: float | None) -> str:
    """A share in percent, as Markdown."""
    return verbatim(percent(value))


# pictures


def picture_entries(folder: Path, details: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Title and path of each picture that `draw_pictures` wrote."""
    for kind in ("worst", "best"):
        for number, entry in enumerate(details.get("shown", {}).get(kind, [])[:SHOWN_PICTURES], 1):
            path = f"{PICTURES}/{kind}_{number}.jpg"
            if (folder / path).is_file():
                counts = f"{int(entry['found'])} found, {int(entry['wrong'])} wrong, {int(entry['missed'])} missed"
                yield {"title": verbatim(f"{kind.capitalize()} {number}: {counts}"), "path": verbatim(path)}


# training


def data_lines(fingerprint: Mapping[str, Any], dataset: str) -> Iterator[str]:
    """The training data, with digests of its annotations, which users with the same data can compare."""
    if fingerprint:
        side = fingerprint.get("tile_size")
        samples = f"tiles of {int(side)} x {int(side)} pixels" if side else "images"
        yield verbatim(f"Data: {escape(dataset)}, {int(fingerprint['train_images']):,} {samples} per epoch")
        for split, key in (("train", "train_data"), ("valid", "valid_data")):
            digest = escape(str(fingerprint.get(key)), code=True)
            yield verbatim(f"Fingerprint of the {split} annotations (SHA-256): `{digest}`")


def cost_lines(state: Mapping[str, Any]) -> Iterator[str]:
    """Steps, time, hardware and software, as the training callback Cost records them in trainer_state.json."""
    if state:
        yield verbatim(f"Length: {state['global_step']:,} steps, {state['epoch'] or 0:.1f} epochs")
    cost = state.get("stateful_callbacks", {}).get("Cost", {}).get("attributes")
    if cost:
        memory = f"peak memory of a process {cost['peak_memory'] / GIBIBYTE:.1f} GiB"
        yield verbatim(f"Time: {duration(cost['seconds'])}, evaluations included")
        yield verbatim(f"Hardware: {int(cost['processes'])} x {escape(cost['hardware'])}; {memory}")
        yield verbatim(f"Software: {escape(cost['software'])}")


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


# licences


def source_name(source: str) -> str:
    """A Hub id unchanged, or the name of a folder, so that the card shows no local paths."""
    return Path(source).name if Path(source).is_absolute() else source
