"""Read configurations and weights of model folders and Hub ids, which are not trusted.

No code from them is run, numbers in a configuration are bounded, and a model that lacks a tensor is refused, because
the tensor would stay random.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 256,
    "depths": 256,
    "encoder_layers": 64,
    "decoder_layers": 64,
    "hidden_size": 16384,
    "hidden_sizes": 16384,
    "intermediate_size": 65536,
    "mlp_ratio": 64,
    "hidden_dim": 8192,
    "feature_size": 8192,
    "mask_feature_size": 8192,
    "neck_channels": 8192,
    "dim_feedforward": 65536,
    "encoder_feedforward_dim": 65536,
    "num_queries": 10000,
    "num_register_tokens": 1024,
    "patch_size": 256,
    "image_size": 16384,
    "image_height": 16384,
    "image_width": 16384,
    "train_num_points": 2**20,
    "oversample_ratio": 100,
}
"""Largest accepted value of each configuration field, far above those of published models."""


class ModelError(ValueError):
    """A backbone, head or model folder can't be loaded or doesn't fit. The message says what to do."""


def check_limits(fields: Mapping[str, Any], where: str) -> None:
    """Raise ModelError if a field of a configuration, or of a nested one, is beyond `LIMITS`."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            check_limits(value, where)
        for one in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
            is_number = isinstance(one, int | float)
            if name in LIMITS and is_number and not -LIMITS[name] <= one <= LIMITS[name]:
                raise ModelError(f"{where}: {name} is {one}, and the limit is {LIMITS[name]}. Correct it")


def with_floats(value: Any, hint: Any) -> Any:
    """The value with whole numbers as floats where its type has floats and no ints: JSON may have 5 for 5.0.

    >>> with_floats([0, 4095], list[float] | None)
    [0.0, 4095.0]
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, list | tuple):
        inside = next((get_args(kind)[0] for kind in kinds if get_origin(kind) in (list, tuple)), Any)
        return type(value)(with_floats(one, inside) for one in value)
    return float(value) if type(value) is int and float in kinds and int not in kinds else value


def strict_message(error: StrictDataclassError) -> str:
    """The message of a configuration's type check in one line."""
    return " ".join(str(error).split())


def load_config(source: str) -> PreTrainedConfig:
    """The configuration of a folder or Hub id.

    Its `attn_implementation` is ignored: transformers would download a kernel of that name and run it.

    Raises:
        OSError: there is none.
        ModelError: the model needs its own code, or a field is beyond `LIMITS` or of a wrong type.
        ValueError, KeyError: transformers rejects the configuration.
    """
    fields, _ = PreTrainedConfig.get_config_dict(source)
    check_limits(fields, f"config.json of {source!r}")
    if fields.get("model_type") not in CONFIG_MAPPING and "auto_map" in fields:
        raise ModelError(
            f"{source!r} holds a {fields.get('model_type')!r} model that needs its own code, which is never run. Give "
            "a model of transformers or of m2f_trainer"
        )
    try:
        return without_kernels(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except StrictDataclassError as error:
        raise ModelError(f"config.json of {source!r}: {strict_message(error)}. Correct it") from error


def read_json_file(source: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or Hub id; None if there is none of that name.

    Raises:
        OSError: there is no such folder or Hub id.
        ModelError: it is no JSON object.
    """
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{name} of {source!r} is no JSON: {error}. Copy it again") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{name} of {source!r} is no JSON object. Copy it again")
    return fields


def without_kernels(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove `attn_implementation` from a configuration and its nested ones; transformers then chooses one."""
    config._attn_implementation = None
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            without_kernels(inner)
    return config


def load_weights(
    model_class: Any, source: str, is_needed: Callable[[str], bool] = lambda name: True, **options: Any
) -> Any:
    """A model with the weights of a folder or Hub id, in float32.

    Args:
        model_class: a model class of transformers or of this package.
        is_needed: whether a tensor of this name must be there; others may be missing.
        options: for its `from_pretrained`, such as `config`.

    Raises:
        OSError: there are no safetensors weights.
        ModelError: a file is damaged, or a needed tensor is missing or of another shape.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would print a table of all tensors
    try:
        model, report = model_class.from_pretrained(
            source,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype="float32",
            **options,
        )
    except SafetensorError as error:
        raise ModelError(
            f"the weights in {source!r} are damaged ({error}): the file was cut short or changed. Copy it again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    for name, found, expected in sorted(report["mismatched_keys"]):
        if is_needed(name):
            raise ModelError(
                f"the weights in {source!r} don't fit its configuration: {name} has the shape {list(found)} instead of "
                f"{list(expected)}. Copy the whole folder again"
            )
    missing = sorted(filter(is_needed, report["missing_keys"]))
    if missing:
        raise ModelError(
            f"{source!r} lacks {len(missing)} of the model's tensors, such as {', '.join(missing[:3])}, which would "
            "stay random. Copy the whole folder again"
        )
    return model


def share_weights(folder: Path) -> None:
    """Give the weights in a folder the permissions of its config.json: safetensors' files are for their owner only.

    Links, and files whose permissions can't be changed, stay as they are.
    """
    config = folder / "config.json"
    for path in folder.glob("*.safetensors") if config.exists() else ():
        if not path.is_symlink():
            with suppress(OSError):
                path.chmod(config.stat().st_mode)
