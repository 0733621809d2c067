"""What differs where weights are sharded over the processes (FSDP2): a tensor of one rank is a part of the whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from m2f_trainer.errors import RecipeError


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks where it is sharded; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def require_accelerators(arguments: TrainingArguments) -> None:
    """Raise RecipeError where a recipe asks for FSDP and accelerate would run without it, not saying so."""
    if arguments.fsdp and (arguments.world_size < 2 or arguments.device.type == "cpu"):
        raise RecipeError(
            "fsdp shards over several accelerators under torchrun, and here there is one process, or only CPUs: leave "
            "fsdp out, or start with bash recipes/torchrun_single_node.sh GPUS RECIPE.json"
        )
