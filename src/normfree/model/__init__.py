"""The architecture under study, as Hugging Face classes.

Importing this package registers them with the Auto classes. The other modules of this folder import only torch,
transformers (with its huggingface_hub) and each other: `save_pretrained` copies them into the saved folder, which then
loads with `trust_remote_code=True` even if normfree is not installed.
"""

import transformers

from .classification import NormFreeForSequenceClassification, NormFreeForTokenClassification
from .configuration import NormFreeConfig
from .modeling import NormFreeForCausalLM, NormFreeModel

__all__ = ["NormFreeConfig", "NormFreeForCausalLM", "NormFreeModel"]

transformers.AutoConfig.register(NormFreeConfig.model_type, NormFreeConfig, exist_ok=True)
NormFreeConfig.register_for_auto_class()
for _model in (NormFreeModel, NormFreeForCausalLM, NormFreeForSequenceClassification, NormFreeForTokenClassification):
    _auto = _model.__name__.replace("NormFreeModel", "AutoModel").replace("NormFreeFor", "AutoModelFor")
    getattr(transformers, _auto).register(NormFreeConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto)
