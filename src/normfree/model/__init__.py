"""The architecture under study, as Hugging Face classes.

Importing this package registers them with the Auto classes. The other modules of this folder import only torch,
transformers (with its huggingface_hub) and each other: `save_pretrained` copies them into the saved folder, which then
loads with `trust_remote_code=True` even if normfree is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import NormFreeConfig
from .modeling import NormFreeForCausalLM, NormFreeModel

__all__ = ["NormFreeConfig", "NormFreeForCausalLM", "NormFreeModel"]

AutoConfig.register(NormFreeConfig.model_type, NormFreeConfig, exist_ok=True)
AutoModel.register(NormFreeConfig, NormFreeModel, exist_ok=True)
AutoModelForCausalLM.register(NormFreeConfig, NormFreeForCausalLM, exist_ok=True)
NormFreeConfig.register_for_auto_class()
NormFreeModel.register_for_auto_class("AutoModel")
NormFreeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
