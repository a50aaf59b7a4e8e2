"""Write what open_clip 3.3.0 says, for tests that do without it (it needs torchvision).

open_clip_tower.safetensors: a small image tower with random weights, images, and its features.
open_clip_loaded.safetensors: of a `ViT` that was written as `mlcd export` does and loaded by open_clip's `local-dir:`:
images and features, and in the header the names and shapes of everything that open_clip's model has.
open_clip_pair.safetensors: the same of both towers, with SigLIP's bias, tokens and the texts' embeddings.

  pip install open_clip_torch==3.3.0 && python tests/models/data/make_open_clip_tower.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from mlcd_ds.models.open_clip import open_clip_config, placeholder_text_tower, to_open_clip
from mlcd_ds.models.text import TextConfig, TextTower
from mlcd_ds.models.vit import ViT, ViTConfig

HERE = Path(__file__).parent
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
# A layer norm's epsilon that is not the default, and an MLP whose width is not a multiple.
OURS = ViTConfig(
    image_size=32,
    patch_size=8,
    width=36,
    depth=2,
    heads=4,
    mlp_width=85,
    embed_dim=20,
    norm_eps=1e-2,
    activation="gelu",
)
# An end token that is not the one of largest number.
OUR_TEXT = TextConfig(
    vocab_size=50,
    context=7,
    width=32,
    depth=2,
    heads=4,
    mlp_width=75,
    embed_dim=20,
    norm_eps=1e-2,
    activation="gelu",
    end_token=3,
)


def disturb(module: torch.nn.Module) -> None:
    """Biases and norms begin as zeros and ones."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def write_tower() -> None:
    torch.manual_seed(0)
    tower = open_clip.CLIP(embed_dim=20, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).visual.eval()
    disturb(tower)
    images = torch.randn(3, 3, 32, 32)
    tensors = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(tensors | {"images": images, "features": tower(images)}, HERE / "open_clip_tower.safetensors")


@torch.no_grad()
def write_loaded() -> None:
    torch.manual_seed(0)
    ours = ViT(OURS)
    ours.init_weights(torch.Generator().manual_seed(0))
    disturb(ours)
    state = to_open_clip(ours.state_dict(), OURS)
    with tempfile.TemporaryDirectory() as folder:
        save_file(state | placeholder_text_tower(OURS.embed_dim), Path(folder, "open_clip_model.safetensors"))
        Path(folder, "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip_config(OURS)}))
        model = open_clip.create_model(f"local-dir:{folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat", "a dog"])
    model.eval()
    assert not model.encode_text(tokens).any()
    images = torch.randn(3, 3, 32, 32)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    header = {"shapes": json.dumps(shapes), "config": OURS.model_dump_json()}
    tensors = {"images": images, "features": model.encode_image(images)}
    save_file(state | tensors, HERE / "open_clip_loaded.safetensors", header)


@torch.no_grad()
def write_pair() -> None:
    torch.manual_seed(0)
    image, text = ViT(OURS), TextTower(OUR_TEXT)
    for tower in (image, text):
        tower.init_weights(torch.Generator().manual_seed(0))
        disturb(tower)
    state = to_open_clip(image.state_dict(), OURS) | to_open_clip(text.state_dict(), OUR_TEXT)
    state |= {"logit_scale": torch.tensor(2.5), "logit_bias": torch.tensor(-7.0)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder, "open_clip_model.safetensors"))
        config = {"model_cfg": open_clip_config(OURS, OUR_TEXT, -9.0)}
        Path(folder, "open_clip_config.json").write_text(json.dumps(config))
        model = open_clip.create_model(f"local-dir:{folder}").eval()
    assert model.logit_bias == -7.0
    images, tokens = torch.randn(3, 3, 32, 32), torch.tensor([[1, 9, 49, 8, 3, 0, 0], [1, 3, 3, 3, 3, 3, 3]])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    header = {"shapes": json.dumps(shapes), "image": OURS.model_dump_json(), "text": OUR_TEXT.model_dump_json()}
    given = {"images": images, "tokens": tokens}
    told = {"features": model.encode_image(images), "texts": model.encode_text(tokens)}
    save_file(state | given | told, HERE / "open_clip_pair.safetensors", header)


if __name__ == "__main__":
    write_tower()
    write_loaded()
    write_pair()
