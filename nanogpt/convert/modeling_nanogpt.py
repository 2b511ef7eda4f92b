"""nanogpt's GPT as a transformers model, for architectures that no transformers class supports.

export.py --custom_code=True writes this file, model.py and loss.py beside the weights, and
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) runs them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nanogpt.model import GPT, GPTConfig, Position


class NanoGPTConfig(PretrainedConfig):
    """Configuration: the fields of nanogpt's GPTConfig in `gpt`, and attributes that transformers reads."""

    model_type = "nanogpt"

    def __init__(self, gpt: dict[str, Any] | None = None, **others: Any):
        self.gpt = gpt or {}
        shape = GPTConfig(**self.gpt)
        self.vocab_size, self.max_position_embeddings = shape.vocab_size, shape.block_size
        self.hidden_size, self.num_hidden_layers = shape.n_embd, shape.n_layer
        self.num_attention_heads = shape.n_head
        self.use_cache = False
        super().__init__(**others)


class NanoGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoGPTConfig
    base_model_prefix = "gpt"

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Fill the position tables in place, since files contain parameters only."""
        if isinstance(module, Position):
            shape = self.gpt.config
            fresh = type(module)(shape.block_size, shape.n_embd, shape.n_head, shape.head_size)
            for name, table in fresh.named_buffers():
                module.get_buffer(name).copy_(table)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.gpt.wte

    def prepare_inputs_for_generation(self, input_ids: Tensor, **others: Any) -> dict[str, Any]:
        return {"input_ids": input_ids[:, -self.gpt.config.block_size :]}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Return the logits (B, T, V) of `input_ids` (B, T) and, with `labels` (B, T; -100 is ignored), the
        mean next-token loss in nats. There is no KV cache: generation recomputes the context for each token.

        Raise ValueError for left padding.
        """
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError("left padding is not supported: pad on the right")
        logits, _ = self.gpt(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)
