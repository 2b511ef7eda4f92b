"""LoRA adapters: zero at initialization, equal function when merged, and target selection."""

from dataclasses import replace

import pytest
import torch

from nanogpt.errors import UserError
from nanogpt.finetune import lora
from nanogpt.finetune.lora import Adapters
from nanogpt.model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16)
IDX = torch.arange(24).view(2, 12)


def adapted(config: GPTConfig, adapters: Adapters, seed: int = 1) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    lora.adapt(model, adapters)
    lora.initialize(model, seed)
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "position": "rope", "n_kv_head": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_logits_are_bit_identical_to_the_base_model(changes, dtype):
    config = replace(SMALL, **changes)
    torch.manual_seed(0)
    plain = GPT(config).eval().to(dtype)
    model = adapted(config, Adapters(8, 16.0, "c_attn,c_proj,c_fc")).to(dtype)
    assert torch.equal(plain(IDX)[0], model(IDX)[0])
    assert sum(lora.is_adapter(name) for name, _ in model.named_parameters()) == 2 * 4 * 2


def test_merged_model_computes_the_same_function():
    adapters = Adapters(4, 6.0, "c_attn,c_proj")
    model = adapted(SMALL, adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(lora.B):
                parameter.normal_(std=0.5)
    tensors = dict(model.named_parameters())
    merged = dict(lora.merged(tensors, lambda name: tensors[name].detach(), adapters))
    plain = GPT(SMALL).eval()
    plain.load_state_dict(merged)  # strict: no remaining adapter and no missing weight
    unadapted = GPT(SMALL).eval()
    unadapted.load_state_dict({name: tensors[name] for name in merged})
    with torch.no_grad():
        assert (plain(IDX)[0] - model(IDX)[0]).abs().max() < 1e-6
        assert (unadapted(IDX)[0] - model(IDX)[0]).abs().max() > 1e-3


def test_targets_match_names_or_full_names():
    model = GPT(SMALL)
    lora.adapt(model, Adapters(2, 2.0, "h.1.mlp.*, c_attn"))
    assert [name for name, module in model.named_modules() if isinstance(module, lora.AdaptedLinear)] == [
        "h.0.attn.c_attn",
        "h.1.attn.c_attn",
        "h.1.mlp.c_fc",
        "h.1.mlp.c_proj",
    ]
    with pytest.raises(UserError, match=r"'q_proj' matches no linear layer.*c_attn, c_proj, c_fc"):
        lora.adapt(GPT(SMALL), Adapters(2, 2.0, "c_attn,q_proj"))
