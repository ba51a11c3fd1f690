"""The same model in PyTorch: a Hugging Face Llama of a given shape with random weights.

Extra: pip install -e '.[bench]'.
"""

import importlib.util

from srm_jax.models.config import TransformerConfig

MISSING = "PyTorch, transformers or trl is missing, so there is nothing to compare with: pip install -e '.[bench]'"


def installed(*further: str) -> bool:
  return all(importlib.util.find_spec(name) for name in ('torch', 'transformers', *further))


def llama(config: TransformerConfig, *, dtype: str):
  """A transformers LlamaForCausalLM of this shape in `dtype`, with attention by torch's fused kernel."""
  import torch
  import transformers

  torch.manual_seed(0)
  shape = transformers.LlamaConfig(
      vocab_size=config.vocab_size, hidden_size=config.embed_dim, intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
      num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_length,
      rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings, bos_token_id=None, eos_token_id=None,
      pad_token_id=0, attn_implementation='sdpa',
  )
  return transformers.LlamaForCausalLM(shape).to(getattr(torch, dtype))


def sampler(config: TransformerConfig, prompts, *, max_new_tokens: int, dtype: str):
  """A function that samples from the whole distribution at temperature 1, with log-probabilities, through `generate`.

  Args:
    prompts: int [B, T], of equal length.

  Returns:
    () -> (tokens [B, max_new_tokens], logprobs [B, max_new_tokens]) as torch tensors.
  """
  import torch

  model, inputs = llama(config, dtype=dtype).eval(), torch.as_tensor(prompts, dtype=torch.long)

  @torch.inference_mode()
  def sample():
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=max_new_tokens, max_new_tokens=max_new_tokens, output_logits=True, return_dict_in_generate=True,
    )
    logprobs = model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
    return out.sequences[:, inputs.shape[1] :], logprobs

  return sample
