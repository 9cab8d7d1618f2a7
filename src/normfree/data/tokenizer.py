"""Load a tokenizer or train a byte-level BPE; encode text; count the bytes of tokens."""

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from normfree.files import fingerprint

END_TOKEN = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly `vocab_size` pieces with an end token; the same texts give the same tokenizer.

    Raises ValueError if the texts do not contain that many pieces.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (pieces := tokenizer.get_vocab_size()) != vocab_size:
        problem = f"data.vocab_size={vocab_size}: the training text has only {pieces} pieces"
        raise ValueError(f"{problem}; give more text or a smaller vocab_size")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, bos_token=END_TOKEN)


def load_tokenizer(place: str) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a folder or hub name. Raises ValueError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        advice = "give a folder or hub name (without a network: downloaded before), or leave it empty to train one"
        raise ValueError(f"data.tokenizer={place!r} cannot be loaded ({type(error).__name__}): {advice}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"data.tokenizer={place!r} is {type(tokenizer).__name__}: give one with a tokenizer.json")
    if tokenizer.bos_token == END_TOKEN:  # ours: the saved one of an encoder-decoder names the end of a target instead
        tokenizer.eos_token = END_TOKEN
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> int:
    """Number of embeddings that the ids need: more than there are pieces if the ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the canonical content of tokenizer.json."""
    return fingerprint(json.loads(tokenizer.backend_tokenizer.to_str()))


class Encoder:
    """Encode text without special tokens: text that spells the end token stays text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.bytes_V = _bytes_of_pieces(self._tokenizer)
        """UTF-8 bytes of each piece; None if only offsets say how much text a token stands for."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One (S, 1) int32 array of token ids for each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32)[:, None] for encoding in encodings]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One (S, 2) int32 array for each text: token ids, and UTF-8 bytes that sum to the size of the text.

        Exact for byte-level tokenizers. For others a token covers the text from the end of the token before it.
        """
        if self.bytes_V is not None:
            return [np.concatenate([ids_S1, self.bytes_V[ids_S1]], axis=1) for ids_S1 in self.encode(texts)]
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            np.stack([np.array(encoding.ids, dtype=np.int32), _bytes_by_offsets(text, encoding)], axis=1)
            for text, encoding in zip(texts, encodings, strict=True)
        ]


def _bytes_of_pieces(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of every piece of a byte-level tokenizer, in which one character is one byte; None for other tokenizers.

    Text never becomes a special token. Other added tokens, such as a run of blanks, may include the blanks around them,
    so only offsets say how much text they stand for.
    """
    added = tokenizer.get_added_tokens_decoder()
    pieces = {piece: number for piece, number in tokenizer.get_vocab().items() if number not in added}
    if (
        not isinstance(tokenizer.decoder, decoders.ByteLevel)
        or tokenizer.normalizer is not None
        or '"add_prefix_space": true' in json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
        or not all(token.special for token in added.values())
        or not set(pre_tokenizers.ByteLevel.alphabet()).issuperset("".join(pieces))
    ):
        return None
    sizes_V = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    sizes_V[list(pieces.values())] = list(map(len, pieces))
    return sizes_V


def _bytes_by_offsets(text: str, encoding: Encoding) -> np.ndarray:
    reached = accumulate((end for _, end in encoding.offsets), max, initial=0)
    return np.array([len(text[start:end].encode()) for start, end in pairwise(reached)], dtype=np.int32)
