"""The transformer decoder against transformers' own."""

import torch

from m2f_trainer.model.transformer_decoder import QueryDecoder, attention_mask
from tests.model.reference import feature_maps, reference_model


def test_hidden_states_and_masks_of_every_layer_are_transformers() -> None:
    model = reference_model()
    theirs = model.model.transformer_module
    mine = QueryDecoder(model.config.feature_size, model.config).eval()
    mine.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        pixels = model.model.pixel_level_module.decoder(feature_maps(model))
        levels, features = list(pixels.multi_scale_features), pixels.mask_features
        expected, (hidden, embeddings) = theirs(levels, features), mine(levels, features)
    masks = torch.einsum("lbqc,bchw->lbqhw", embeddings, features)
    torch.testing.assert_close(masks, torch.stack(expected.masks_queries_logits), rtol=1e-4, atol=1e-4)
    states = torch.stack(expected.intermediate_hidden_states).transpose(1, 2)  # theirs are (L, Q, B, C)
    torch.testing.assert_close(hidden, states, rtol=1e-4, atol=1e-4)


def test_a_query_attends_inside_its_mask_or_everywhere_if_that_is_empty() -> None:
    features = torch.tensor([[[[1.0, -1.0], [0.0, 2.0]]]])
    embeddings = torch.tensor([[[1.0], [-1.0], [0.0]]])
    allowed = attention_mask(embeddings, features)
    assert allowed.tolist() == [[[[True, False, True, True], [False, True, True, False], [True] * 4]]]
    nowhere = attention_mask(torch.tensor([[[-1.0]]]), features.abs() + 1)
    assert nowhere.all()
