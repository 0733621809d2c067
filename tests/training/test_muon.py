"""Muon against torch's own, and against AdamW for what isn't a matrix."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from m2f_trainer.config.training_arguments import TrainArguments
from m2f_trainer.errors import RecipeError
from m2f_trainer.model.lora import LoraSettings, set_tuning
from m2f_trainer.training.muon import RATE, MuonAdamW, orthogonal
from m2f_trainer.training.optimizer import build_optimizer, matrices
from tests.model.tiny import tiny_model

LEARNING_RATE, DECAY = 1e-2, 0.05


def gradients(shape: tuple[int, ...], steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def trained(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, given: list[torch.Tensor]) -> torch.Tensor:
    """The parameter after a step for each gradient."""
    for gradient in given:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


def muon(parameter: nn.Parameter, parts: int = 1, precision: torch.dtype = torch.float32) -> MuonAdamW:
    settings = {"lr": LEARNING_RATE, "weight_decay": DECAY}
    return MuonAdamW([parameter], matrices={parameter: parts}, precision=precision, **settings)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_matrix_is_stepped_as_by_torchs_muon_at_a_multiple_of_the_rate(
    shape: tuple[int, int], precision: torch.dtype
) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    stock = torch.optim.Muon(
        [theirs], lr=RATE * LEARNING_RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    moved = trained(ours, muon(ours, precision=precision), gradients(shape)) - start
    wanted = trained(theirs, stock, gradients(shape)) - start
    assert (moved - wanted).norm() < 0.02 * wanted.norm()  # torch's computes in bfloat16


def test_all_singular_values_of_an_update_come_near_to_1() -> None:
    several = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for given in (several, several.transpose(1, 2), 1e-6 * several):
        found = orthogonal(given)
        values = torch.linalg.svdvals(found)
        assert found.shape == given.shape
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3
    assert torch.equal(orthogonal(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_a_packed_attention_is_stepped_as_three_matrices_and_a_kernel_as_one() -> None:
    packed = nn.Parameter(torch.zeros(36, 12))
    given = gradients((36, 12))
    whole = trained(packed, muon(packed, parts=3), given)
    for part in range(3):
        rows = slice(12 * part, 12 * part + 12)
        single = nn.Parameter(torch.zeros(12, 12))
        alone = trained(single, muon(single), [gradient[rows] for gradient in given])
        torch.testing.assert_close(whole[rows], alone)
    kernel, flat = nn.Parameter(torch.zeros(8, 3, 2, 2)), nn.Parameter(torch.zeros(8, 12))
    given = gradients((8, 3, 2, 2))
    found = trained(kernel, muon(kernel), given)
    torch.testing.assert_close(found.flatten(1), trained(flat, muon(flat), [one.flatten(1) for one in given]))


def test_what_is_no_matrix_is_stepped_by_adamw_to_the_last_bit() -> None:
    matrix, ours, theirs = (nn.Parameter(torch.ones(6, 6)) for _ in range(3))
    optimizer = MuonAdamW([matrix, ours], matrices={matrix: 1}, lr=LEARNING_RATE, weight_decay=DECAY)
    stock = torch.optim.AdamW([theirs], lr=LEARNING_RATE, weight_decay=DECAY)
    for gradient in gradients((6, 6)):
        matrix.grad, ours.grad, theirs.grad = (gradient.clone() for _ in range(3))
        optimizer.step()
        stock.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(matrix, ours)


def test_a_restored_optimizer_goes_on_to_the_last_bit() -> None:
    def pair() -> tuple[nn.Parameter, nn.Parameter]:
        return nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5))

    def made(matrix: nn.Parameter, vector: nn.Parameter) -> MuonAdamW:
        return MuonAdamW([matrix, vector], matrices={matrix: 1}, lr=LEARNING_RATE)

    def step(optimizer: MuonAdamW, matrix: nn.Parameter, vector: nn.Parameter, number: int) -> None:
        matrix.grad, vector.grad = gradients((4, 6), 8)[number], gradients((5,), 8)[number]
        optimizer.step()

    matrix, vector = pair()
    optimizer = made(matrix, vector)
    for number in range(4):
        step(optimizer, matrix, vector, number)
    held, weights = copy.deepcopy(optimizer.state_dict()), (matrix.detach().clone(), vector.detach().clone())
    for number in range(4, 8):
        step(optimizer, matrix, vector, number)
    again = nn.Parameter(weights[0]), nn.Parameter(weights[1])
    restored = made(*again)
    restored.load_state_dict(held)
    for number in range(4, 8):
        step(restored, *again, number)
    assert torch.equal(matrix, again[0])
    assert torch.equal(vector, again[1])


def test_muon_steps_the_matrices_of_neck_and_head_alone() -> None:
    model = tiny_model()
    set_tuning(model, "lora", LoraSettings(rank=2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: parts for parameter, parts in matrices(model).items()}
    decoder = "model.transformer_module.decoder.layers.0"
    assert found[f"{decoder}.fc1.weight"] == found[f"{decoder}.self_attn.q_proj.weight"] == 1
    assert found[f"{decoder}.cross_attn.in_proj_weight"] == 3
    assert found["model.pixel_level_module.decoder.mask_projection.weight"] == 1
    apart = ("backbone", "embedder.weight", "features.weight", "level_embed", "sampling_offsets", "attention_weights")
    assert not [name for name in found if name.endswith("bias") or any(word in name for word in apart)]
    assert "class_predictor.weight" not in found


def test_muon_is_the_default_and_other_optimizers_stay() -> None:
    model = tiny_model()
    assert isinstance(build_optimizer(model, TrainArguments(use_cpu=True, report_to="none")), MuonAdamW)
    plain = build_optimizer(model, TrainArguments(use_cpu=True, report_to="none", optim="adamw_torch"))
    assert type(plain) is torch.optim.AdamW


def test_where_processes_hold_parts_of_matrices_muon_is_refused_and_not_the_default() -> None:
    assert TrainArguments(use_cpu=True, report_to="none", fsdp=True).optim == "adamw_torch_fused"
    with pytest.raises(RecipeError, match="optim=muon orthogonalises whole matrices, but fsdp"):
        TrainArguments(use_cpu=True, report_to="none", fsdp=True, optim="muon")


def test_bf16_recipes_orthogonalise_in_bfloat16(tmp_path: Path) -> None:
    for bf16, precision in ((True, torch.bfloat16), (False, torch.float32)):
        arguments = TrainArguments(output_dir=str(tmp_path), optim="muon", bf16=bf16, use_cpu=True)
        optimizer = build_optimizer(tiny_model(), arguments)
        assert isinstance(optimizer, MuonAdamW)
        assert optimizer.precision == precision
