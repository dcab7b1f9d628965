"""The text LM against transformers' own Llama, packed and loaded."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from megaprior.errors import DataError, UsageError
from megaprior.models.lm import ModelConfig, TextLM, build_text_lm, load_text_lm

LENGTHS = (9, 1, 30, 17, 12)
IDS = {"vocab_size": 97, "bos_id": 1, "eos_id": 2}


def stock_twin(model: TextLM) -> LlamaForCausalLM:
    config = type(model.config)(**model.config.to_dict())
    twin = LlamaForCausalLM(config)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("backend", ["segments", "masked"])
def test_packed_states_and_gradients_equal_each_segment_alone(llama, row, backend):
    model = TextLM(llama())
    model.attention = backend
    twin = stock_twin(model)
    packed = row(LENGTHS)
    weight = torch.randn(sum(LENGTHS), 32)

    hidden = model.states(**packed.inputs).hidden
    (hidden * weight).sum().backward()
    alone = torch.cat([twin.model(s[None]).last_hidden_state[0] for s in packed.segments])
    (alone * weight).sum().backward()

    assert (hidden - alone).abs().max() < 1e-5
    for (name, ours), theirs in zip(model.model.named_parameters(), twin.model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max().clamp(min=1), name


def test_permuting_neighbours_changes_a_segment_by_rounding_only(llama, row):
    model = TextLM(llama()).eval()
    first, *others = row(LENGTHS).segments
    Row = type(row([1]))
    places = [Row((first, *others)), Row((*others[::-1], first)), Row((others[2], first, others[0])), Row((first,))]
    states = []
    with torch.no_grad():
        for place in places:
            start = sum(len(s) for s in place.segments[: next(i for i, s in enumerate(place.segments) if s is first)])
            states.append(model.states(**place.inputs).hidden[start : start + len(first)])
    for other in states[1:]:
        assert (states[0] - other).abs().max() < 1e-5


def test_no_quadratic_mask_is_built(llama, row):
    model = TextLM(llama())
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    model.states(**row(LENGTHS).inputs)
    assert seen == [0]


def test_checkpointing_changes_no_gradient(llama, row):
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = TextLM(llama()).train()
        if on:
            model.checkpoint_activations()
        packed = row(LENGTHS)
        targets = packed.inputs["input_ids"].roll(-1)
        loss, _ = model.lm_head(model.states(**packed.inputs).hidden, targets, None, 50.0)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_padded_batches_and_generation_are_transformers_own(llama):
    model = TextLM(llama()).eval()
    twin = stock_twin(model).eval()
    ids = torch.randint(3, 97, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask).logits for m in (model, twin))
        assert (ours - theirs)[mask.bool()].abs().max() < 1e-5
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))


def test_casting_keeps_rotary_frequencies_exact(llama):
    model = TextLM(llama())
    exact = model.model.rotary_emb.inv_freq.clone()
    torch.nn.Sequential(model).bfloat16()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_reads_what_we_save(llama, tmp_path, tied):
    model = TextLM(llama(tie_word_embeddings=tied)).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(97, (1, 20))
    assert torch.equal(
        stock(ids, attention_mask=torch.ones_like(ids)).logits, model(ids, attention_mask=torch.ones_like(ids)).logits
    )


@pytest.mark.parametrize("tied", [False, True])
def test_folders_of_stock_transformers_load(llama, row, tmp_path, tied):
    stock = LlamaForCausalLM(llama(tie_word_embeddings=tied)).eval()
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    model = load_text_lm(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert not model.training
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    packed = row([12])
    hidden = model.states(**packed.inputs).hidden
    assert (model.lm_head(hidden) - stock(packed.segments[0][None]).logits[0]).abs().max() < 1e-5
    assert load_text_lm(tmp_path, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16


def test_scratch_weights_are_a_function_of_the_seed():
    config = ModelConfig(preset="tiny")
    before = torch.get_rng_state()
    first, again, other = (build_text_lm(config, **{**IDS, "vocab_size": 5000}, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert abs(first.lm_head.weight.std().item() - 0.02) < 0.02 / math.sqrt(5000)
    assert first.training
    assert (first.config.bos_token_id, first.config.eos_token_id) == (1, 2)


def test_the_paper_preset_is_llama_3_8b():
    llama = ModelConfig(preset="paper").sizes.llama
    vocab, h, ffn, kv = 128_256, llama["hidden_size"], llama["intermediate_size"], llama["num_key_value_heads"]
    head = h // llama["num_attention_heads"]
    layer = 2 * h * h + 2 * h * kv * head + 3 * h * ffn + 2 * h
    assert 2 * vocab * h + llama["num_hidden_layers"] * layer + h == 8_030_261_248  # parameters of the published model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(), "no model is given: set model.init to a folder, or model.preset to one of tiny, paper"),
        (ModelConfig(preset="tiny", llama={"hiden_size": 64}), "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        (ModelConfig(preset="tiny", llama={"hidden_size": 130}), "130"),
        (ModelConfig(init="somewhere", llama={"hidden_size": 64}), "drop one"),
    ],
)
def test_configurations_without_sense_are_refused(config, message):
    with pytest.raises(UsageError) as error:
        build_text_lm(config, **IDS)
    assert message in str(error.value)


def test_folders_that_are_no_text_lm_are_refused(llama, tmp_path):
    stock = LlamaForCausalLM(llama())
    with pytest.raises(DataError, match=r"config.json: no such file"):
        load_text_lm(tmp_path / "absent")

    weights = {k: v for k, v in stock.state_dict().items() if k != "model.norm.weight"}
    stock.save_pretrained(tmp_path / "lacking", state_dict=weights)
    with pytest.raises(DataError, match=r"lacks 1 tensors, model.norm.weight among them"):
        load_text_lm(tmp_path / "lacking")

    stock.save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(DataError, match=r"model_type is 'gpt2', a text LM is a 'llama'"):
        load_text_lm(tmp_path / "foreign")

    stock.save_pretrained(tmp_path / "small")
    with pytest.raises(DataError, match=r"has 97 embeddings, the tokenizer has 98 ids"):
        build_text_lm(ModelConfig(init=str(tmp_path / "small")), **{**IDS, "vocab_size": 98})


def test_pickled_weights_are_never_opened(llama, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    llama().save_pretrained(tmp_path)
    torch.save(Trap(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="no readable safetensors"):
        load_text_lm(tmp_path)
    assert not (tmp_path / "sprung").exists()
