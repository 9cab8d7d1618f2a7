"""The encoder-decoder: one stack sees all of the source, the other makes the target and attends to the first."""

# B batch, S tokens of the source, T tokens of the target, E hidden size, V vocabulary

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import Attention, CrossAttention
from .blocks import Block, CrossBlock
from .configuration import NormFreeSeq2SeqConfig
from .loss import IGNORED, token_loss
from .modeling import NormFreeModel, NormFreeModelOutput, NormFreePreTrainedModel, is_plain
from .spans import corrupt


class Seq2SeqPreTrainedModel(NormFreePreTrainedModel):
    """What all parts of an encoder-decoder share."""

    config_class = NormFreeSeq2SeqConfig
    _supports_flash_attn = _supports_flex_attn = False  # they take no bias of scores
    _no_split_modules = [CrossBlock.__name__]


class NormFreeEncoder(Seq2SeqPreTrainedModel, NormFreeModel):
    """Embeddings, which the decoder shares, blocks and a final norm."""

    is_causal = False

    @capture_outputs
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> NormFreeModelOutput:
        """Final hidden states (B, S, E); `attention_mask` (B, S) is 0 at padding."""
        tokens_BSE = cast(nn.Module, self.embed_tokens)(input_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=tokens_BSE, attention_mask=attention_mask)
        mask = self.positions.add_to(cast(Tensor | None, mask), tokens_BSE.shape[1], is_causal=False)
        return self._outputs(tokens_BSE, attention_mask=mask, **kwargs)


class NormFreeDecoder(Seq2SeqPreTrainedModel, NormFreeModel):
    """Blocks with attention to the encoder's states, and a final norm."""

    _can_record_outputs = {
        "hidden_states": Block,
        "attentions": OutputRecorder(Attention, index=1, layer_name="attention"),
        "cross_attentions": CrossAttention,
    }

    blocks = {"sequential": CrossBlock}

    def __init__(self, config: NormFreeSeq2SeqConfig) -> None:
        super().__init__(config)
        self.embed_tokens = None

    @capture_outputs
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs_embeds: Tensor,
        encoded_BSE: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> NormFreeModelOutput:
        """Final hidden states (B, T, E); the masks, (B, T) and (B, S), are 0 at padding."""
        own = {"config": self.config, "inputs_embeds": inputs_embeds}
        mask = create_causal_mask(**own, attention_mask=attention_mask, past_key_values=None)
        mask = self.positions.add_to(cast(Tensor | None, mask), inputs_embeds.shape[1], is_causal=True)
        own |= {"attention_mask": encoder_attention_mask, "encoder_hidden_states": encoded_BSE}
        masks = {"attention_mask": mask, "encoder_mask": create_bidirectional_mask(**own)}
        return self._outputs(inputs_embeds, encoded_BSE=encoded_BSE, **masks, **kwargs)


class NormFreeSeq2SeqModel(Seq2SeqPreTrainedModel):
    """Encoder and decoder, with one matrix of embeddings."""

    def __init__(self, config: NormFreeSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = NormFreeEncoder(config)
        self.decoder = NormFreeDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.encoder.embed_tokens)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Final hidden states (B, T, E) of the decoder. There is no cache: `use_cache` is ignored."""
        if decoder_input_ids is None:
            raise ValueError("give decoder_input_ids, or labels to a model with a head")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask=attention_mask, **kwargs)
        decoded = self.decoder(
            self.get_input_embeddings()(decoder_input_ids),
            encoder_outputs[0],
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=attention_mask,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded[0],
            encoder_last_hidden_state=encoder_outputs[0],
            cross_attentions=decoded.get("cross_attentions"),
            **{f"encoder_{name}": encoder_outputs.get(name) for name in ("hidden_states", "attentions")},
            **{f"decoder_{name}": decoded.get(name) for name in ("hidden_states", "attentions")},
        )


class NormFreeForSeq2SeqLM(Seq2SeqPreTrainedModel, GenerationMixin):
    """A language model of targets, given their sources."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: NormFreeSeq2SeqConfig) -> None:
        super().__init__(config)
        self.model = NormFreeSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def batch_of(self, rows_BT: Tensor) -> dict[str, Tensor]:
        """Sources and targets of rows that hold both, or of blocks of a text, whose masked spans make the target."""
        size, masks = self.config.target_tokens, {}
        if size:
            source_BS, target_BT = rows_BT[:, :-size], rows_BT[:, -size:]
            is_source_BS, is_target_BT = (_until_end(part, self.config.eos_token_id) for part in (source_BS, target_BT))
            masks = {"attention_mask": is_source_BS.long(), "decoder_attention_mask": is_target_BT.long()}
            target_BT = target_BT.masked_fill(~is_target_BT, IGNORED)
        else:
            source_BS, target_BT = corrupt(rows_BT, self.config)
        before_BT = self.prepare_decoder_input_ids_from_labels(target_BT)
        return {"input_ids": source_BS, "decoder_input_ids": before_BT, "labels": target_BT, **masks}

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The token before each of the labels (B, T); -100, which is not read, becomes the start token."""
        start = cast(int, self.config.decoder_start_token_id)
        return F.pad(labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, start), (1, 0), value=start)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_logits: bool = True,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, T, V), and with `labels` (B, T) their mean cross-entropy in nats; -100 is ignored.

        `decoder_input_ids` default to the labels, moved right behind the start token. `return_logits=False` and
        `logits_to_keep` are as in `NormFreeForCausalLM`.
        """
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(input_ids, attention_mask, decoder_input_ids, **kwargs)
        hidden_BTE, logits_BTV, loss = outputs.last_hidden_state, None, None
        if return_logits or labels is None or not is_plain(self.lm_head):
            logits_BTV = self.lm_head(hidden_BTE[:, -logits_to_keep:])
        if labels is not None and logits_BTV is None:
            loss = token_loss(hidden_BTE.flatten(0, 1), self.lm_head.weight, labels.flatten(), num_items_in_batch)
        elif labels is not None and logits_BTV is not None:
            total = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            loss = total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        passed = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits_BTV, **passed)


def _until_end(ids_BT: Tensor, end: Any) -> Tensor:
    """True up to the first end token of each row, and at it."""
    is_end_BT = (ids_BT == end).long()
    return is_end_BT.cumsum(1) - is_end_BT == 0
