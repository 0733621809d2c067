"""One training step, compared with transformers' model: time, kept activations, peak memory, device synchronisations.

python -m benchmarks.train_step --side 512 --instances 20 --tune full frozen
python -m benchmarks.train_step --side 256 512 1024 --instances 5 20 60 200 --tune full lora frozen
python -m benchmarks.train_step --device cuda --backbone vitl16 --side 1024 --batch 4 --queries 200 --bf16 --graphs
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, compared, parser, peak_mb, report, synchronisations
from benchmarks.stock import BACKBONES, our_model, scene, stock_model
from m2f_trainer.model.lora import set_tuning
from m2f_trainer.model.mask2former import M2FModel
from m2f_trainer.training.cuda_graphs import StepGraphs
from m2f_trainer.training.dry_run import kept_bytes


def main() -> None:
    """Measure every combination of the options and print a table."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as in training; no effect on a CPU
    cases = [(tune, side, count) for side in arguments.side for count in arguments.instances for tune in arguments.tune]
    rows = [measure(arguments, *case) for case in cases]
    report("Train step: forward, backward, clipping, AdamW", rows, arguments)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--backbone", default="vits16plus", choices=list(BACKBONES))
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--side", type=int, nargs="+", default=[512])
    made.add_argument("--instances", type=int, nargs="+", default=[20])
    made.add_argument("--tune", nargs="+", default=["full"], choices=["full", "lora", "frozen"])
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--queries", type=int, default=100)
    made.add_argument("--bf16", action="store_true", help="autocast")
    made.add_argument("--compile", action="store_true", help="compile ours as torch_compile does, and all of stock")
    made.add_argument("--graphs", action="store_true", help="replay ours as cuda_graphs does, with --device cuda")
    return made.parse_args()


def measure(arguments: argparse.Namespace, tune: str, side: int, instances: int) -> dict[str, Any]:
    """One row: ours and stock with the same tuning, and stock with full tuning, on the same batch."""
    models: dict[str, nn.Module] = {}
    ours = our_model(arguments.backbone, side, num_queries=arguments.queries)
    if tune != "full":
        models["stock full"] = stock_model(ours)
    set_tuning(ours, tune)
    models |= {"stock": stock_model(ours), "ours": ours}
    ours_batch, stock_batch = scene(arguments.batch, side, instances, arguments.device)
    steps, kept = {}, {}
    for name, model in models.items():
        model.to(arguments.device).train()
        batch = ours_batch if name == "ours" else stock_batch
        forward = forward_of(model, batch, arguments)
        kept[name] = kept_bytes(forward, model)
        if arguments.graphs and isinstance(model, M2FModel):
            StepGraphs(model.model)
        steps[name] = step_of(forward, model)
    seconds = alternate(steps, arguments.repeats, arguments.device)
    row = compared(seconds, arguments.device)
    whole = {**seconds, "stock": seconds.get("stock full", seconds["stock"])}
    cuda = arguments.device != "cpu"  # on a CPU, memory that earlier steps freed would hide the peak
    measured = {
        "kept MB": {name: kept[name] / 1e6 for name in steps},
        "peak MB": {name: peak_mb(step, arguments.device) if cuda else None for name, step in steps.items()},
        "synchronisations": {name: synchronisations(step, arguments.device) for name, step in steps.items()},
    }
    return {
        "tune": tune,
        "side": side,
        "instances": instances,
        **row,
        "ratio to stock full": compared(whole, arguments.device)["ratio"],
        **{f"{name} {what}": values[name] for what, values in measured.items() for name in ("ours", "stock")},
        "kept ratio": kept["ours"] / kept["stock"],
    }


def forward_of(model: nn.Module, batch: dict[str, Any], arguments: argparse.Namespace) -> Callable[[], Tensor]:
    if arguments.compile:
        (model.encoder if isinstance(model, M2FModel) else model).compile()

    def forward() -> Tensor:
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bf16):
            loss: Tensor = model(**batch).loss
        return loss.sum()

    return forward


def step_of(forward: Callable[[], Tensor], model: nn.Module) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step() -> None:
        forward().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 0.01)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
