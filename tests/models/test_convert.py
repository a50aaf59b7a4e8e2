import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlcd_ds.models.convert import from_vision_model, to_vision_model, vision_config
from mlcd_ds.models.vit import ViT, ViTConfig

SHAPES = {
    "patch8": dict(image_size=32, patch_size=8, width=48, depth=2, heads=4, mlp_width=96, embed_dim=24),
    "patch14": dict(image_size=56, patch_size=14, width=40, depth=3, heads=5, mlp_width=112, embed_dim=64),
    "rotary": dict(image_size=56, patch_size=14, width=48, depth=3, heads=4, mlp_width=96, embed_dim=24)
    | dict(positions="rope2d"),
}
TOLERANCE = 1e-12  # in float64; measured 7.1e-15 at most, on tokens of magnitude 7 (5.0e-6 in float32)


def random_vit(shape: str, activation: str = "quick_gelu", norm_eps: float = 1e-5) -> ViT:
    """A model whose every parameter, norms and biases too, is random."""
    generator = torch.Generator().manual_seed(0)
    model = ViT(ViTConfig(**SHAPES[shape], activation=activation, norm_eps=norm_eps))
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def random_images(config: ViTConfig) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, config.image_size, config.image_size, generator=generator, dtype=torch.float64)


def hugging_face_outputs(folder: Path, model: ViT, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Write the folder, load it as a user would, and return last_hidden_state and pooler_output in float64."""
    from transformers import AutoModel, CLIPVisionModel

    state = {name: tensor.float() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(vision_config(model.config)))
    loader = CLIPVisionModel if model.config.positions == "learned" else AutoModel
    loaded, report = loader.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], (problem, report[problem])
    with torch.no_grad():
        outputs = loaded.eval().double()(random_images(model.config))
    return outputs.last_hidden_state, outputs.pooler_output


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same(shape: str, activation: str, tmp_path: Path) -> None:
    model = random_vit(shape, activation, norm_eps=1e-4)
    state = to_vision_model(model.state_dict())
    assert all(name.startswith("vision_model.") for name in state)
    tokens, pooled = hugging_face_outputs(tmp_path, model, state)
    with torch.no_grad():
        images = random_images(model.config)
        ours_tokens, ours_pooled = model.forward_tokens(images), model.forward_features(images)
    # transformers turns queries and keys in float32, whatever their type: measured 3.8e-7
    tolerance = TOLERANCE if model.config.positions == "learned" else 5e-6
    assert (tokens - ours_tokens).abs().max() < tolerance
    assert (pooled - ours_pooled).abs().max() < tolerance


def test_known_bad_twins_differ(tmp_path: Path) -> None:
    model = random_vit("patch8")
    with torch.no_grad():
        ours = model.forward_tokens(random_images(model.config))
    swapped = to_vision_model(model.state_dict())
    q, k = (f"vision_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    swapped[q], swapped[k] = swapped[k], swapped[q]
    tokens, _ = hugging_face_outputs(tmp_path, model, swapped)
    assert (tokens - ours).abs().max() > 1.0
    other_activation = ViT(model.config.model_copy(update={"activation": "gelu"})).double()
    other_activation.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (other_activation.forward_tokens(random_images(model.config)) - ours).abs().max() > 1e-3


def test_other_angles_differ() -> None:
    """Known-bad twins of the rotary positions: rows for columns, no angles for the class token."""
    model = random_vit("rotary", "gelu")
    images = random_images(model.config)
    with torch.no_grad():
        ours = model.forward_tokens(images)
        assert (model.forward_tokens(images.transpose(2, 3)) - ours).abs().max() > 1e-2
        model.rotary.class_pos_emb.zero_()
        assert (model.forward_tokens(images) - ours).abs().max() > 1e-2


def test_dropped_patches_keep_their_angles() -> None:
    """With all patches kept, in another order, the class token sees the same."""
    model = random_vit("rotary", "gelu")
    images, order = random_images(model.config), torch.randperm(16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.forward_tokens(images)
        kept = order.expand(2, -1)
        rotation = model.rotary(4, kept)
        tokens = model.encoder(model.pre_layrnorm(model.embeddings(images, kept)), None, rotation)
        assert (tokens[:, 0] - expected[:, 0]).abs().max() < TOLERANCE
        wrong = model.encoder(model.pre_layrnorm(model.embeddings(images, kept)), None, model.rotary(4))
        assert (wrong[:, 0] - expected[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["patch14", "rotary"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_round_trip_is_exact(prefixed: bool, shape: str, tmp_path: Path) -> None:
    model = random_vit(shape, "gelu")
    save_file(to_vision_model(model.state_dict()), tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    if not prefixed:
        stored = {name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
    config, state = from_vision_model(stored, vision_config(model.config))
    assert config == model.config
    original = model.state_dict()
    assert original.keys() - state.keys() == {"projection.weight"} and not state.keys() - original.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, original[name]) and tensor.data_ptr() != original[name].data_ptr(), name


def test_reads_what_transformers_saves(tmp_path: Path) -> None:
    """A CLIPVisionModel and a whole CLIPModel, each with a config.json that leaves some defaults out."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = dict(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, intermediate_size=96)
    vision = CLIPVisionModel(CLIPVisionConfig(**shape)).eval()
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    whole = CLIPModel(CLIPConfig(vision_config=shape, text_config=text, projection_dim=20)).eval()
    images = torch.randn(2, 3, 32, 32)
    for name, saved in (("vision", vision), ("whole", whole)):
        saved.save_pretrained(tmp_path / name)
        hf_config = json.loads((tmp_path / name / "config.json").read_text())
        if name == "vision":
            del hf_config["num_attention_heads"], hf_config["hidden_act"]
        config, state = from_vision_model(load_file(tmp_path / name / "model.safetensors"), hf_config)
        assert config.embed_dim == (512 if name == "vision" else 20) and config.heads == 12
        ours = ViT(config)
        assert ours.load_state_dict(state, strict=False).missing_keys == ["projection.weight"]
        tower = saved if name == "vision" else saved.vision_model
        with torch.no_grad():
            assert (ours.forward_features(images) - tower(images).pooler_output).abs().max() < 1e-5  # float32


def test_from_vision_model_names_what_does_not_fit() -> None:
    model = random_vit("patch8")
    hf_config, state = vision_config(model.config), to_vision_model(model.state_dict())
    buffers = {"vision_model.embeddings.position_ids": torch.arange(17), "logit_scale": torch.ones(())}
    text = {"text_model.final_layer_norm.bias": torch.ones(4), "visual_projection.weight": torch.ones(4, 48)}
    config, read = from_vision_model(state | buffers | text, hf_config)
    assert config == model.config and len(read) == len(state)
    with pytest.raises(ValueError, match=r"unexpected.*encoder.rope"):
        from_vision_model(state | {"vision_model.encoder.rope": torch.ones(1)}, hf_config)
    with pytest.raises(ValueError, match=r"missing.*encoder\.layers\.2\.mlp\.fc1\.bias"):
        from_vision_model(state, hf_config | {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"position_embedding\.weight has shape"):
        from_vision_model(state, hf_config | {"image_size": 64})
    with pytest.raises(ValueError, match="twice"):
        from_vision_model(state | {"pre_layrnorm.bias": torch.ones(48)}, hf_config)
    with pytest.raises(ValueError, match="model_type 'siglip'"):
        from_vision_model(state, hf_config | {"model_type": "siglip"})
    rotary = vision_config(random_vit("rotary").config)
    with pytest.raises(ValueError, match="rope_theta"):
        from_vision_model({}, rotary | {"rope_parameters": {"rope_theta": 100.0}})
    with pytest.raises(ValueError, match=r"missing.*rotary\.class_pos_emb"):
        from_vision_model({}, rotary)
    with pytest.raises(ValueError, match="num_channels 1"):
        from_vision_model(state, hf_config | {"num_channels": 1})
    with pytest.raises(ValueError, match="activation"):
        from_vision_model(state, hf_config | {"hidden_act": "relu"})
