"""Write open_clip_tower.safetensors: a small image tower of open_clip with random weights, images, and its features.

  pip install open_clip_torch==3.3.0 && python tests/models/data/make_open_clip_tower.py

A file, because open_clip needs torchvision, which the tests do without.
"""

from __future__ import annotations

from pathlib import Path

import torch
from open_clip import CLIP
from safetensors.torch import save_file

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}

torch.manual_seed(0)
tower = CLIP(embed_dim=20, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).visual.eval()
with torch.no_grad():
    for parameter in tower.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms begin as zeros and ones
    images = torch.randn(3, 3, 32, 32)
    tensors = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(
        tensors | {"images": images, "features": tower(images)}, Path(__file__).with_name("open_clip_tower.safetensors")
    )
