"""The card's account of the training: data, time, hardware, software, and the recipe itself."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from m2f_trainer.recipe import GROUPS
from m2f_trainer.sharing.markdown import code, escape, without_folders

OF_ONE_PLACE = {
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "allow_changes", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_timeout", "report_to", "logging_steps",
    "save_strategy", "save_steps", "eval_strategy", "eval_steps", "hub_strategy", "hub_model_id", "hub_revision",
    "hub_private_repo", "push_to_hub", "save_total_limit", "per_device_eval_batch_size", "remove_unused_columns",
    "label_names", "logging_nan_inf_filter", "restore_callback_states_from_checkpoint", "accelerator_config",
    "run_name", "project", "disable_tqdm", "logging_dir", "local_rank", "hub_token", "do_eval",
    "ddp_find_unused_parameters", "dataloader_prefetch_factor", "include_for_metrics",
}  # fmt: skip
"""Fields that say where and how a run was kept, or that can't be otherwise; the model would be the same without."""

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
    every = [one for group in GROUPS for one in fields(group) if one.init and one.name not in OF_ONE_PLACE]
    ours = {name for group in GROUPS for name in group.__annotations__}
    kept = [
        one.name
        for one in every
        if recipe.get(one.name) not in (None, [], *([] if one.name in ours else [one.default]))
    ]
    return without_folders({name: recipe[name] for name in kept})
