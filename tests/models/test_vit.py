import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlcd_ds.models.layers import PatchEmbedding, attend
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.tower import nan_parameters, num_parameters
from mlcd_ds.models.vit import ViT, ViTConfig, flops_per_image

TINY = dict(image_size=32, patch_size=8, width=48, depth=2, heads=4, mlp_width=96, embed_dim=24)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_config_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValidationError, match=r"image_size 30 .*patch_size 8.*image_size to 32"):
        ViTConfig(**{**TINY, "image_size": 30})
    with pytest.raises(ValidationError, match=r"width 48 .*heads 5.*width to 50"):
        ViTConfig(**{**TINY, "heads": 5})
    with pytest.raises(ValidationError, match="extra"):
        ViTConfig(**TINY, dropout=0.1)
    with pytest.raises(ValidationError, match="depth"):
        ViTConfig(**{**TINY, "depth": 0})
    with pytest.raises(ValidationError, match="frozen"):
        ViTConfig(**TINY).width = 64


def test_construction_is_all_nan_and_draws_nothing() -> None:
    state = torch.random.get_rng_state()
    model = ViT(ViTConfig(**TINY))
    assert all(parameter.isnan().all() for parameter in model.parameters())
    model.init_weights(generator())
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was used"
    assert nan_parameters(model) == []


@pytest.mark.parametrize("name", [name for name, _ in ViT(ViTConfig(**TINY)).named_parameters()])
def test_a_forgotten_parameter_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the initialisation of each parameter in turn, as though init_weights had forgotten it."""
    model = ViT(ViTConfig(**TINY))
    finish = model.projection.init_weights

    def forget(std: float, generator: torch.Generator) -> None:
        finish(std, generator)
        with torch.no_grad():
            model.get_parameter(name).fill_(math.nan)

    monkeypatch.setattr(model.projection, "init_weights", forget)
    with pytest.raises(AssertionError, match=name):
        model.init_weights(generator())


def test_meta_construction_gives_the_same_weights() -> None:
    config = ViTConfig(**TINY)
    with torch.device("meta"):
        on_meta = ViT(config)
    with pytest.raises(ValueError, match="to_empty"):
        on_meta.init_weights(generator())
    on_meta.to_empty(device="cpu")
    on_meta.init_weights(generator(3))
    model = ViT(config)
    model.init_weights(generator(3))
    for (name, mine), other in zip(model.named_parameters(), on_meta.parameters(), strict=True):
        assert torch.equal(mine, other), name
    other_seed = ViT(config)
    other_seed.init_weights(generator(4))
    assert not torch.equal(model.projection.weight, other_seed.projection.weight)


def test_init_has_clips_scales() -> None:
    config = ViTConfig(image_size=64, patch_size=8, width=256, depth=3, heads=4, mlp_width=1024, embed_dim=128)
    model = ViT(config)
    model.init_weights(generator())
    block = model.encoder.layers[1]
    expected = {
        model.embeddings.class_embedding: 256**-0.5,
        model.embeddings.position_embedding.weight: 256**-0.5,
        model.embeddings.patch_embedding.weight: (3 * 3 * 8 * 8) ** -0.5,
        block.self_attn.q_proj.weight: 256**-0.5,
        block.self_attn.out_proj.weight: 256**-0.5 * (2 * 3) ** -0.5,
        block.mlp.fc1.weight: (2 * 256) ** -0.5,
        block.mlp.fc2.weight: 256**-0.5 * (2 * 3) ** -0.5,
        model.projection.weight: 256**-0.5,
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel()))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


@pytest.mark.parametrize("shape", [(8, 32), (14, 56)])
def test_patch_embedding_is_a_convolution(shape: tuple[int, int]) -> None:
    patch_size, image_size = shape
    embedding = PatchEmbedding(patch_size, 40).double()
    embedding.init_weights(generator())
    images = torch.randn(2, 3, image_size, image_size, generator=generator(1), dtype=torch.float64)
    oracle = F.conv2d(images, embedding.weight, stride=patch_size).flatten(2).transpose(1, 2)
    ours = embedding(images)
    assert (ours - oracle).abs().max() < 1e-12
    assert (embedding(images.transpose(2, 3)) - oracle).abs().max() > 0.1, "known-bad twin: rows and columns swapped"


def test_forward_shapes_and_errors() -> None:
    config = ViTConfig(**TINY)
    model = ViT(config)
    model.init_weights(generator())
    images = torch.randn(3, 3, 32, 32, generator=generator(1))
    features = model.forward_features(images)
    assert features.shape == (3, 48) and model.forward_tokens(images).shape == (3, config.num_patches + 1, 48)
    assert torch.equal(model(images), F.linear(features, model.projection.weight))
    for shape in ((1, 3, 36, 36), (1, 3, 40, 32), (1, 1, 32, 32)):
        with pytest.raises(ValueError, match="S a multiple of 8"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("positions", ["learned", "rope2d"])
def test_images_of_another_size_are_those_of_a_model_with_resized_positions(positions: str) -> None:
    config = ViTConfig(**{**TINY, "width": 64}, positions=positions)
    model, larger = ViT(config).double(), ViT(config.model_copy(update={"image_size": 48})).double()
    model.init_weights(generator())
    state = dict(model.state_dict())
    if positions == "learned":
        resized = resize_positions(state["embeddings.position_embedding.weight"], 36)
        state["embeddings.position_embedding.weight"] = resized
    larger.load_state_dict(state)
    images = torch.randn(2, 3, 48, 48, generator=generator(1), dtype=torch.float64)
    assert torch.equal(model(images), larger(images)) and model.forward_tokens(images).shape[1] == 37
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if positions == "learned":
        with torch.no_grad():
            larger.embeddings.position_embedding.weight[1:] = resized[1:].flip(0)
        assert (model(images) - larger(images)).abs().max() > 1e-3, "known-bad twin: positions upside down"


@pytest.mark.parametrize("positions", ["learned", "rope2d"])
def test_registers_are_tokens_without_a_place(positions: str) -> None:
    config = ViTConfig(**{**TINY, "width": 64}, positions=positions, num_registers=7)
    model = ViT(config).double()
    model.init_weights(generator())
    images = torch.randn(2, 3, 32, 32, generator=generator(1), dtype=torch.float64)
    before = model(images)
    assert model.forward_tokens(images).shape == (2, 24, 64)
    with torch.no_grad():
        model.embeddings.register_embedding.copy_(model.embeddings.register_embedding.flip(0))
    assert torch.allclose(model(images), before, atol=1e-12), "their order says nothing"
    with torch.no_grad():
        model.embeddings.register_embedding.zero_()
    assert (model(images) - before).abs().max() > 1e-6, "they are seen"
    if model.rotary is not None:
        rotation = model.rotary(4)
        assert (rotation.cosines[1:8] == 1).all() and (rotation.sines[1:8] == 0).all(), "registers are not turned"
    dropping = TrainingNoise(torch.arange(2), token_drop=0.5)
    assert model.forward_tokens(images, dropping).shape[1] == 16
    assert model.embeddings(images, None)[:, 1:8].abs().max() == 0, "behind the class token"


def test_every_parameter_gets_a_gradient() -> None:
    model = ViT(ViTConfig(**TINY))
    model.init_weights(generator())
    model(torch.randn(2, 3, 32, 32, generator=generator(1))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # a constant added to all keys of a head cancels in the softmax
        assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("size", "token_drop", "num_registers"), [(32, 0.0, 0), (48, 0.0, 3), (64, 0.5, 0)])
def test_flops_equal_what_torch_counts(activation: str, size: int, token_drop: float, num_registers: int) -> None:
    config = ViTConfig(**TINY, activation=activation, num_registers=num_registers)
    model = ViT(config)
    model.init_weights(generator())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, size, size), TrainingNoise(torch.arange(2), token_drop=token_drop))
    assert counter.get_total_flops() == 2 * flops_per_image(config, size, token_drop)
    assert counter.get_total_flops() != 2 * flops_per_image(config.model_copy(update={"heads": 4, "mlp_width": 97}))


def test_vit_b32_has_the_published_size() -> None:
    config = ViTConfig(image_size=224, patch_size=32, width=768, depth=12, heads=12, mlp_width=3072, embed_dim=512)
    with torch.device("meta"):
        model = ViT(config)
    assert num_parameters(model) == 87_456_000 + 768 * 512
    assert flops_per_image(config) == pytest.approx(8.8e9, rel=0.02)  # 4.4 GMAC, as open_clip and timm state


def test_sixteen_bit_attention_on_a_cpu_is_that_of_32_bits_rounded() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=generator).bfloat16() for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert attend(q, k, v).dtype == torch.bfloat16 and torch.equal(attend(q, k, v), expected.bfloat16())
    assert not torch.equal(attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, v, k))
    assert attend(q.double(), k.double(), v.double()).dtype == torch.float64
