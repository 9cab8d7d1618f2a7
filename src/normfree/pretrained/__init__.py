"""Pretrained models: loading, GGUF files, conversion to NormFreeForCausalLM."""
