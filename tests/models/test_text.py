import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlcd_ds.models import layers
from mlcd_ds.models.convert import clip_config, from_text_model, from_vision_model, text_config, to_clip_model
from mlcd_ds.models.text import TextConfig, TextTower, flops_per_text
from mlcd_ds.models.tower import num_parameters
from mlcd_ds.models.vit import ViT, ViTConfig

END = 90
CONFIG = TextConfig(vocab_size=97, context=13, width=48, depth=3, heads=4, mlp_width=112, embed_dim=24, end_token=END)
IMAGE = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, embed_dim=24)
TOLERANCE = 1e-5  # measured: 9.1e-7


def tower(config: TextConfig = CONFIG, seed: int = 0) -> TextTower:
    model = TextTower(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def texts(count: int = 7, seed: int = 1) -> Tensor:
    """Of every length, the end token last, then padding that differs from text to text."""
    tokens_BL = torch.randint(1, END, (count, CONFIG.context), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(torch.linspace(1, CONFIG.context, count).long()):
        tokens_BL[row, length - 1] = END
        tokens_BL[row, length:] = row % 3 * 45  # zeros, other tokens, and the end token again
    return tokens_BL


def transformers_tower(config: dict) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    return CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()


def test_config_refuses_what_does_not_fit() -> None:
    values = CONFIG.model_dump()
    with pytest.raises(ValidationError, match=r"width 48 .*heads 5.*width to 50"):
        TextConfig(**{**values, "heads": 5})
    with pytest.raises(ValidationError, match="end_token 97 is not below vocab_size 97"):
        TextConfig(**{**values, "end_token": 97})


def test_every_parameter_is_set_from_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    assert all(parameter.isnan().all() for parameter in TextTower(CONFIG).parameters())
    first, second, other = tower(), tower(), tower(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was used"
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)) and parameter.isfinite().all()
        assert parameter.ndim == 1 or not torch.equal(parameter, other.get_parameter(name))
    deviations = {
        "embeddings.token_embedding.weight": 0.02,
        "embeddings.position_embedding.weight": 0.01,
        "projection.weight": CONFIG.width**-0.5,
    }
    for name, wanted in deviations.items():
        assert float(first.get_parameter(name).detach().std()) == pytest.approx(wanted, rel=0.1), name


def largest_differences(model: TextTower, peer: torch.nn.Module, tokens_BL: Tensor) -> dict[str, float]:
    """Of embeddings and of every gradient, over the largest entry."""
    upstream_BE = torch.randn(len(tokens_BL), CONFIG.embed_dim, generator=torch.Generator().manual_seed(2))
    ours_BE, theirs_BE = model(tokens_BL), peer(tokens_BL).text_embeds
    (ours_BE * upstream_BE).sum().backward()
    (theirs_BE * upstream_BE).sum().backward()
    gradients = to_text_names({name: parameter.grad for name, parameter in model.named_parameters()})
    pairs = {"embeddings": (ours_BE, theirs_BE)}
    for name, parameter in peer.named_parameters():
        if not name.endswith("k_proj.bias"):  # whose gradient is 0 but for rounding
            pairs[name] = gradients[name], parameter.grad
    return {name: float(((a - b).abs().max() / b.abs().max()).detach()) for name, (a, b) in pairs.items()}


def to_text_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in to_clip_model({}, tensors, torch.zeros(())).items() if k != "logit_scale"}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_it_equals_transformers(activation: str) -> None:
    peer = transformers_tower(text_config(CONFIG.model_copy(update={"activation": activation})))
    config, state = from_text_model(peer.state_dict(), peer.config.to_dict())
    assert config.activation == activation and config.model_copy(update={"activation": "quick_gelu"}) == CONFIG
    model = TextTower(config)
    model.load_state_dict(state)
    differences = largest_differences(model, peer, texts())
    assert max(differences.values()) < TOLERANCE, differences


def without_causality(model: TextTower) -> None:
    for block in model.encoder.blocks:
        block.self_attn.is_causal = False


def with_another_end(model: TextTower) -> None:
    model.config = CONFIG.model_copy(update={"end_token": 7})


@pytest.mark.parametrize("spoil", [without_causality, with_another_end])
def test_a_wrong_mask_and_a_wrong_place_are_told_apart(spoil: Callable[[TextTower], None]) -> None:
    peer = transformers_tower(text_config(CONFIG))
    model = TextTower(CONFIG)
    model.load_state_dict(from_text_model(peer.state_dict(), peer.config.to_dict())[1])
    spoil(model)
    assert largest_differences(model, peer, texts())["embeddings"] > 1e3 * TOLERANCE


def test_the_sign_of_older_configs_means_the_largest_token() -> None:
    older = text_config(CONFIG) | {"eos_token_id": 2}
    peer = transformers_tower(older)
    config, state = from_text_model(peer.state_dict(), peer.config.to_dict())
    assert config.end_token == CONFIG.vocab_size - 1
    model = TextTower(config)
    model.load_state_dict(state)
    tokens_BL = texts().where(texts() != END, config.end_token)
    assert largest_differences(model, peer, tokens_BL)["embeddings"] < TOLERANCE


def test_what_is_behind_the_end_changes_nothing() -> None:
    model, tokens_BL = tower(), texts()
    ends_B = (tokens_BL == END).int().argmax(dim=1)
    is_behind_BL = torch.arange(CONFIG.context) > ends_B[:, None]
    other_BL = tokens_BL.where(~is_behind_BL, 3)
    assert not torch.equal(tokens_BL, other_BL)
    torch.testing.assert_close(model(tokens_BL), model(other_BL), rtol=0, atol=1e-6)
    changed_BL = tokens_BL.clone()
    changed_BL[:, 0] = 95  # ahead of the end, but in the text that has only an end
    assert ((model(tokens_BL) - model(changed_BL)).abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_changes_no_gradient(recompute: layers.Recompute) -> None:
    gradients = []
    for choice in ("none", recompute):
        model = tower()
        model.set_recompute(choice)  # type: ignore[arg-type]
        model(texts()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, computed_again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, computed_again, rtol=1e-5, atol=1e-7)


def test_the_operations_are_those_counted() -> None:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tower()(texts(1))
    future = (
        CONFIG.depth * 2 * CONFIG.context * (CONFIG.context - 1) * CONFIG.width
    )  # torch counts all of the attention
    assert counter.get_total_flops() == flops_per_text(CONFIG) + future
    base = CONFIG.model_copy(update={"vocab_size": 49408, "context": 77, "width": 512, "depth": 12, "mlp_width": 2048})
    with torch.device("meta"):
        count = num_parameters(TextTower(base.model_copy(update={"embed_dim": 512, "heads": 8})))
    assert count == 63_428_096, "CLIP ViT-B/32's text half"


def test_texts_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 14\).*up to 13"):
        tower()(torch.zeros(2, 14, dtype=torch.int64))


def test_both_towers_are_a_clip_model_and_come_back() -> None:
    from transformers import CLIPConfig, CLIPModel

    image, text, log_scale = ViT(IMAGE), tower(), torch.tensor([math.log(30.0)])
    image.init_weights(torch.Generator().manual_seed(3))
    peer = CLIPModel(CLIPConfig(**clip_config(IMAGE, CONFIG))).eval()
    state = to_clip_model(image.state_dict(), text.state_dict(), log_scale)
    peer.load_state_dict(state)  # strictly
    images_BCHW, tokens_BL = torch.rand(4, 3, 32, 32), texts(5)
    with torch.no_grad():
        told = peer(pixel_values=images_BCHW, input_ids=tokens_BL)
        unit_BE, unit_TE = (
            torch.nn.functional.normalize(m(x), dim=1) for m, x in ((image, images_BCHW), (text, tokens_BL))
        )
    torch.testing.assert_close(told.logits_per_image, 30.0 * unit_BE @ unit_TE.T, rtol=0, atol=1e-4)
    hf_config = peer.config.to_dict()
    assert from_text_model(state, hf_config)[0] == CONFIG and from_vision_model(state, hf_config)[0] == IMAGE
    back = from_text_model(state, hf_config)[1]
    assert back.keys() == text.state_dict().keys()
    assert all(torch.equal(tensor, text.state_dict()[name]) for name, tensor in back.items())


def test_towers_and_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="24 and 32 channels"):
        clip_config(IMAGE, CONFIG.model_copy(update={"embed_dim": 32}))
    with pytest.raises(ValueError, match="learned positions"):
        clip_config(IMAGE.model_copy(update={"num_registers": 2}), CONFIG)
    state, config = to_text_names(tower().state_dict()), text_config(CONFIG)
    with pytest.raises(ValueError, match=r"text model.*missing \['projection.weight'\]"):
        from_text_model({k: v for k, v in state.items() if k != "text_projection.weight"}, config)
    with pytest.raises(ValueError, match=r"unexpected \['projection.bias'\]"):
        from_text_model({**state, "text_projection.bias": torch.zeros(24)}, config)
    with pytest.raises(ValueError, match=r"position_embedding.weight has shape"):
        from_text_model(state, config | {"max_position_embeddings": 14})
    with pytest.raises(ValueError, match="clip_vision_model"):
        from_text_model(state, config | {"model_type": "clip_vision_model"})
