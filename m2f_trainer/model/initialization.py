"""Initial weights of new layers: those of the original Mask2Former and ViTDet, not transformers' normal(0, 0.02)."""

import math

from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerPixelDecoderEncoderLayer,
)

from .neck import (
    AdapterPyramid,
    ChannelNorm,
    ConvBlock,
    ConvStem,
    SimplePyramid,
    TopDown,
    TopDownPyramid,
    TopDownStages,
)
from .pixel_decoder import PixelDecoder

NECK_LAYERS = (
    nn.Conv2d, nn.ConvTranspose2d, ChannelNorm, ConvStem, ConvBlock, SimplePyramid, AdapterPyramid, TopDown,
    TopDownPyramid, TopDownStages,
)  # fmt: skip


def init_head_layer(module: nn.Module) -> None:
    """Re-initialise the layers that transformers initialises differently from the original."""
    if isinstance(module, PixelDecoder):
        _init_pixel_decoder(module)
    elif isinstance(module, Mask2FormerPixelDecoderEncoderLayer):
        _xavier_linears(module.fc1, module.fc2)
    elif isinstance(module, Mask2FormerMaskedAttentionDecoderLayer):
        _init_decoder_layer(module)


def _uniform_bias(bias: Tensor | None, fan_in: int) -> None:
    if bias is not None:
        bound = 1 / math.sqrt(fan_in)
        init.uniform_(bias, -bound, bound)


def init_class_head(linear: nn.Linear) -> None:
    """torch's default initialisation, which the original uses for its class head."""
    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    _uniform_bias(linear.bias, linear.in_features)


def init_neck_layer(module: nn.Module) -> None:
    """torch's default initialisation for the neck's convolutions, as in ViTDet's pyramid."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        _uniform_bias(module.bias, module.weight[0].numel())


def _xavier_linears(*linears: nn.Linear) -> None:
    """msdeformattn.py `_reset_parameters`: matrices xavier; biases stay at torch's default."""
    for linear in linears:
        init.xavier_uniform_(linear.weight)
        _uniform_bias(linear.bias, linear.in_features)


def _init_pixel_decoder(decoder: PixelDecoder) -> None:
    """msdeformattn.py: input projections xavier with zero bias; the other convolutions c2_xavier_fill."""
    for projection in decoder.input_projections:
        init.xavier_uniform_(next(projection.children()).weight)  # type: ignore[arg-type]
    filled: list[nn.Sequential] = [*decoder.lateral_convolutions, *decoder.output_convolutions]
    for convolution in (*(sequence[0] for sequence in filled), decoder.mask_projection):
        init.kaiming_uniform_(convolution.weight, a=1)  # type: ignore[arg-type]
    for convolution in (*(next(p.children()) for p in decoder.input_projections), decoder.mask_projection):
        init.zeros_(convolution.bias)  # type: ignore[arg-type]


def _init_decoder_layer(layer: Mask2FormerMaskedAttentionDecoderLayer) -> None:
    """mask2former_transformer_decoder.py: xavier everywhere, attention packed as one (3 C, C) matrix, zero biases."""
    attention = layer.self_attn
    width = attention.embed_dim
    bound = math.sqrt(6 / (width + 3 * width))
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        init.uniform_(linear.weight, -bound, bound)
        init.zeros_(linear.bias)
    for linear in (attention.out_proj, layer.cross_attn.out_proj):
        init.zeros_(linear.bias)
    for linear in (layer.fc1, layer.fc2):
        _uniform_bias(linear.bias, linear.in_features)
