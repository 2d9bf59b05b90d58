"""The pocket models' tokenizer: one token a known word, letters for the rest, `</s>` at the end, padding is 0."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>", "<unk>"]
MODEL_MAX_LENGTH = 32
_LETTERS = string.ascii_lowercase + string.digits + "'-"
_MARKS = ",.!?&"


def build(captions: list[str]) -> PreTrainedTokenizerFast:
    """A word-piece tokenizer over the captions' words; a word it does not know falls apart into known pieces."""
    normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace("\u2019", "'")]
    )
    words = sorted({word.strip(_MARKS) for caption in captions for word in normalizer.normalize_str(caption).split()})
    pieces = SPECIAL + list(_MARKS) + list(_LETTERS) + [f"##{letter}" for letter in _LETTERS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + words))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=40))
    core.normalizer = normalizer
    # Hyphens and apostrophes stay inside a word ("six-thirty", "o'clock"); every other mark stands alone.
    marks = pre_tokenizers.Split(Regex(r"[^\w'\-]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MODEL_MAX_LENGTH,
    )
