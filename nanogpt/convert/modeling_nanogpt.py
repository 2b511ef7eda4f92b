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

# Unused here, but transformers 4 copies only the files that this one imports.
from nanogpt.chunked_loss import chunked_cross_entropy  # noqa: F401
from nanogpt.loss import soft_cap  # noqa: F401
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

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the inputs of a step: the whole text, as far as it fits the context."""
        first = max(0, input_ids.shape[1] - self.gpt.config.block_size)
        mask = None if attention_mask is None else attention_mask[:, first:]
        return {"input_ids": input_ids[:, first:], "attention_mask": mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Return the logits (B, T, V) of `input_ids` (B, T) and, with `labels` (B, T; -100 is ignored), the
        mean next-token loss in nats. There is no KV cache: generation recomputes the context for each token.

        Tokens where `attention_mask` (B, T) is 0 are left out, wherever they are; the others are moved to the
        start of their row, where causal attention does not see what follows.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = mask.bool()
        order = torch.argsort(mask.logical_not().int(), dim=1, stable=True)
        hidden = self.gpt.hidden(input_ids.masked_fill(~real, 0).gather(1, order))
        back = order.argsort(dim=1)[..., None].expand_as(hidden)
        logits = self.gpt.head(hidden.gather(1, back))
        loss = None
        if labels is not None:
            targets = labels[:, 1:].masked_fill(~real[:, :-1], -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
