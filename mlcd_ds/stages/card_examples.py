"""How others load an export: examples for its model card, as text that runs."""

from __future__ import annotations

from mlcd_ds.models.open_clip import mlp_ratio
from mlcd_ds.models.vit import ViTConfig

FOLDER_LINE = 'folder = "path/to/this/folder"\n'
_IMAGE_FEATURES = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

{folder}
model = AutoModel.from_pretrained(folder).eval()
inputs = AutoImageProcessor.from_pretrained(folder)(Image.open("picture.jpg"), return_tensors="pt")
with torch.no_grad():
    features = model(**inputs).pooler_output
"""
_PAIR = """import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, pipeline

{folder}
classify = pipeline("zero-shot-image-classification", model=folder)
answer = classify("picture.jpg", candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {{}}")

model, processor = CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
texts = ["a photo of a cat", "a photo of a dog"]
inputs = processor(images=Image.open("picture.jpg"), text=texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
images, texts, logits = outputs.image_embeds, outputs.text_embeds, outputs.logits_per_image
"""
_SIGMOID = "probabilities = (logits + model.config.logit_bias).sigmoid()\n"
_OPEN_CLIP = """import open_clip
import torch
from PIL import Image

{folder}
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{{folder}}/open_clip")
with torch.no_grad():
    images = model.encode_image(preprocess(Image.open("picture.jpg"))[None], normalize=True)
"""
_OPEN_CLIP_TEXTS = """    tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}/open_clip")
    texts = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"]), normalize=True)
    logits = model.logit_scale.exp() * images @ texts.T
"""
_TIMM = """from functools import partial

import torch
from safetensors.torch import load_file
from timm.layers import {activation}
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

{folder}
model = VisionTransformer(
    img_size={config.image_size},
    patch_size={config.patch_size},
    embed_dim={config.width},
    depth={config.depth},
    num_heads={config.heads},
    mlp_ratio={ratio!r},
    num_classes={config.embed_dim},
    pre_norm=True,
    norm_layer=partial(torch.nn.LayerNorm, eps={config.norm_eps}),
    act_layer={activation},
).eval()
weights = load_file(f"{{folder}}/open_clip/open_clip_model.safetensors")
model.load_state_dict(checkpoint_filter_fn(weights, model))
with torch.no_grad():
    embeddings = model(torch.zeros(1, 3, {config.image_size}, {config.image_size}))
"""


def transformers_example(is_pair: bool, has_bias: bool) -> str:
    """A whole CLIP model, or an image tower."""
    return (_PAIR if is_pair else _IMAGE_FEATURES).format(folder=FOLDER_LINE.strip()) + (_SIGMOID if has_bias else "")


def open_clip_example(is_pair: bool) -> str:
    """The same with open_clip."""
    return (_OPEN_CLIP + (_OPEN_CLIP_TEXTS if is_pair else "")).format(folder=FOLDER_LINE.strip())


def timm_example(config: ViTConfig) -> str:
    """The image tower as timm's, by its own reading of open_clip's layout."""
    activation = "QuickGELU" if config.activation == "quick_gelu" else "GELU"
    ratio = mlp_ratio(config.width, config.mlp_width)
    return _TIMM.format(folder=FOLDER_LINE.strip(), config=config, activation=activation, ratio=ratio)
