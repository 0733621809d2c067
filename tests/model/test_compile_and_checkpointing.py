"""torch.compile sees one graph, and gradient checkpointing saves memory without changing anything."""

import pytest
import torch
from torch import Tensor

from m2f_trainer.model.mask2former import M2FModel
from tests.model.tiny import images, labels, tiny_model

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns at its own code, transformers of a rename


def perturbed() -> M2FModel:
    """Away from the start, where sampling offsets are whole pixels and their gradients are one-sided."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def gradients(model: M2FModel, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def test_everything_before_the_loss_compiles_to_one_graph_in_training() -> None:
    model = perturbed().train()
    pixels = model.normalise(images(), None)
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    found, expected = compiled(pixels), model.model(pixels)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    mine, theirs = gradients(model, found), gradients(model, expected)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4)


def test_prediction_compiles_to_one_graph() -> None:
    model = perturbed().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        found, expected = (run(pixel_values=images(), pixel_mask=mask) for run in (compiled, model))
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["backbone", "pixel decoder", "query decoder"])
def test_gradient_checkpointing_keeps_less_in_every_part(part: str) -> None:
    model = tiny_model(encoder_layers=2).train()
    kept = kept_numbers(model, part)
    model.gradient_checkpointing_enable()
    assert kept_numbers(model, part) < 0.6 * kept


def test_gradient_checkpointing_changes_neither_loss_nor_gradients() -> None:
    model, results = tiny_model().train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        loss = model(pixel_values=images(), **labels()).loss
        results.append((loss, gradients(model, (loss,))))
    (loss, plain), (same, checkpointed) = results
    assert torch.equal(loss, same)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


def kept_numbers(model: M2FModel, part: str) -> int:
    """How many numbers autograd keeps of one part's forward pass, the parameters aside."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    level = model.model.pixel_level_module
    pixels = model.normalise(images(), None)
    maps = level.encoder(pixels)
    features, levels = level.decoder(maps)
    runs = {
        "backbone": lambda: level.encoder.backbone(pixels).feature_maps,
        "pixel decoder": lambda: level.decoder._encode(maps[::-1][:3]),
        "query decoder": lambda: model.model.transformer_module(levels, features),
    }
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        runs[part]()
    return sum(tensor.numel() for tensor in kept.values())
