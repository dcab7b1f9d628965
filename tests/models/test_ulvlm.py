"""The U-LVLM: where pixels go, which folders it starts from, and its four roles."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from megaprior.errors import DataError, UsageError
from megaprior.models.lm import ModelConfig
from megaprior.models.load import load_model
from megaprior.models.ulvlm import ULVLM, ULVLMConfig, build_ulvlm, load_ulvlm

IDS = {"vocab_size": 97, "bos_id": 1, "eos_id": 2}
ROLES = {"patch": 90, "start": 91, "row": 92, "end": 93}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = ModelConfig(llama=SIZES, patch=4, limit=32)


@pytest.fixture
def text_folder(llama, tmp_path):
    folder = tmp_path / "text"
    LlamaForCausalLM(llama()).save_pretrained(folder)
    return folder


def test_patches_are_added_at_their_tokens_and_nowhere_else():
    model = build_ulvlm(SMALL, **IDS, roles=ROLES)
    ids = torch.tensor([1, 91, 90, 90, 92, 90, 93, 5, 6, 2])
    index = torch.tensor([2, 3, 5])
    patches = torch.randint(256, (3, 48), dtype=torch.uint8)

    # Row-major patches flattened as (height, width, channel): the value of channel c at 3 * pixel + c.
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    pixels = (patches.double() / 255 - mean.repeat(16)) / std.repeat(16)
    expected = model.model.embed_tokens.weight.double()[ids]
    expected[index] += pixels @ model.patch_embed.weight.double().T

    assert (model.embed(ids, patches, index) - expected).abs().max() < 1e-6


def test_a_caption_sees_its_image_and_not_its_neighbours(row):
    model = build_ulvlm(SMALL, **IDS, roles=ROLES).eval()
    packed = row([10, 10])
    patches = torch.randint(256, (4, 48), dtype=torch.uint8)
    index = torch.tensor([2, 3, 12, 13])
    changed = patches.clone()
    changed[2:] = 255 - changed[2:]  # the second segment's image
    with torch.no_grad():
        before, after = (model.states(**packed.inputs, patches=p, patch_index=index).hidden for p in (patches, changed))
    assert torch.equal(before[:12], after[:12])
    assert ((before - after)[12:].abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("empty", [None, (0, 48), (0, 0)])
def test_a_row_without_patches_touches_every_parameter(row, empty):
    model = build_ulvlm(SMALL, **IDS, roles=ROLES)
    patches = None if empty is None else torch.empty(empty, dtype=torch.uint8)
    index = None if empty is None else torch.empty(0, dtype=torch.int64)
    hidden = model.states(**row([7]).inputs, patches=patches, patch_index=index).hidden
    loss, _ = model.lm_head(hidden, torch.full((7,), 5), None, 7.0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.patch_embed.weight.grad.any()


def test_it_starts_from_a_text_lm(text_folder):
    model = build_ulvlm(ModelConfig(init=str(text_folder), patch=4, limit=32), **IDS, roles=ROLES, seed=5)
    stock = LlamaForCausalLM.from_pretrained(text_folder).state_dict()
    ours = model.state_dict()
    assert set(ours) - set(stock) == {"patch_embed.weight"}
    assert all(torch.equal(ours[name], value) for name, value in stock.items())
    assert 0.9 < model.patch_embed.weight.std() / 0.2 < 1.1  # initializer_range of the folder
    again = build_ulvlm(ModelConfig(init=str(text_folder), patch=4, limit=32), **IDS, roles=ROLES, seed=5)
    assert torch.equal(model.patch_embed.weight, again.patch_embed.weight)
    assert model.training
    assert (model.config.patch, model.config.limit, model.config.vision_roles) == (4, 32, ROLES)


def test_its_own_folder_gives_the_same_model_back(text_folder, row, tmp_path):
    first = build_ulvlm(ModelConfig(init=str(text_folder), patch=4, limit=32, vision_roles="append"), **IDS, roles=None)
    first.save_pretrained(tmp_path / "own")
    kept = load_ulvlm(tmp_path / "own")
    assert isinstance(load_model(tmp_path / "own"), ULVLM)
    assert kept.config.vision_roles == {"patch": 97, "start": 98, "row": 99, "end": 100}
    assert kept.config.architectures == ["ULVLM"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), kept.parameters(), strict=True))
    resumed = build_ulvlm(ModelConfig(init=str(tmp_path / "own"), limit=64), **IDS, roles=ROLES)
    assert resumed.config.vision_roles == kept.config.vision_roles
    assert (resumed.config.patch, resumed.config.limit) == (4, 64)
    with pytest.raises(UsageError, match=r"was trained with 4-pixel patches, model.patch is 16: use 4"):
        build_ulvlm(ModelConfig(init=str(tmp_path / "own"), preset="tiny"), **IDS, roles=ROLES)


@pytest.mark.parametrize("tied", [False, True])
def test_append_adds_four_rows_at_the_mean(llama, tmp_path, tied):
    stock = LlamaForCausalLM(llama(tie_word_embeddings=tied))
    stock.save_pretrained(tmp_path)
    model = build_ulvlm(ModelConfig(init=str(tmp_path), patch=4, limit=32, vision_roles="append"), **IDS, roles=None)
    assert model.config.vocab_size == 101
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for new, old in ((model.model.embed_tokens, stock.model.embed_tokens), (model.lm_head, stock.lm_head)):
        assert torch.equal(new.weight[:97], old.weight)
        assert (new.weight[97:] - old.weight.mean(0)).abs().max() < 1e-6
    loss, _ = model.lm_head(torch.randn(3, 32), torch.tensor([97, 100, 0]), None, 3.0)
    assert loss.isfinite()


def test_a_tokenizer_without_roles_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match=r"rerun with model.vision_roles=append, which appends four rows"):
        build_ulvlm(SMALL, **IDS, roles=None)


@pytest.mark.parametrize(
    ("config", "roles", "message"),
    [
        (SMALL, {**ROLES, "end": 97}, "lie beyond its 97 embeddings"),
        (SMALL, {**ROLES, "end": 90}, "four different ids"),
        (SMALL, {"patch": 90}, "four different ids"),
        (ModelConfig(llama=SIZES, patch=5, limit=32), ROLES, "limit 32 is not a multiple of patch 5"),
    ],
)
def test_roles_and_patches_that_cannot_be_are_refused(config, roles, message):
    with pytest.raises((UsageError, DataError), match=message):
        build_ulvlm(config, **IDS, roles=roles)


def test_stock_transformers_is_told_that_it_cannot_read_the_folder(tmp_path):
    build_ulvlm(SMALL, **IDS, roles=ROLES).save_pretrained(tmp_path)
    assert ULVLMConfig.from_pretrained(tmp_path).model_type == "megaprior_ulvlm"
