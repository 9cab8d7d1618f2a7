"""The architecture under study, as Hugging Face classes.

Importing this package registers them with the Auto classes. The other modules of this folder import only torch,
transformers (with its huggingface_hub) and each other: `save_pretrained` copies them into the saved folder, which then
loads with `trust_remote_code=True` even if normfree is not installed.
"""

import transformers

from .classification import NormFreeForSequenceClassification, NormFreeForTokenClassification
from .configuration import NormFreeConfig, NormFreeSeq2SeqConfig, NormFreeVisionConfig
from .modeling import NormFreeForCausalLM, NormFreeModel
from .seq2seq import NormFreeForSeq2SeqLM, NormFreeSeq2SeqModel
from .vision import NormFreeForImageClassification, NormFreeVisionModel

__all__ = ["HEADS", "NormFreeConfig", "NormFreeForCausalLM", "NormFreeForImageClassification", "NormFreeModel"]

HEADS = {
    "decoder": NormFreeForCausalLM,
    "vision": NormFreeForImageClassification,
    "encoder_decoder": NormFreeForSeq2SeqLM,
}
"""The model that a run of each family trains; its `config_class` is that of the family."""

for _config in (NormFreeConfig, NormFreeVisionConfig, NormFreeSeq2SeqConfig):
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class()
_BODIES = (NormFreeModel, NormFreeVisionModel, NormFreeSeq2SeqModel)
for _model in (*_BODIES, *HEADS.values(), NormFreeForSequenceClassification, NormFreeForTokenClassification):
    _auto = "AutoModel" if _model in _BODIES else _model.__name__.replace("NormFreeFor", "AutoModelFor")
    getattr(transformers, _auto).register(_model.config_class, _model, exist_ok=True)
    _model.register_for_auto_class(_auto)
