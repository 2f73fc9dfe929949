"""A small byte-level BPE tokenizer, trained in process on fixed text: no files, the same every time."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

# ChatML's shape with the tokenizer's own end token, so that "stop at eos" ends a generated turn.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = (
    "The capital of France is Paris. What is the answer to the question?\n",
    "system\nYou are a helpful assistant.\nuser\nHow many apples are there?\nassistant\nThere are 3 apples.\n",
    "Write a function that returns the sum of the two numbers, and explain how it works.\n\n",
    "Sort these words: banana, apple, cherry. The sorted list is apple, banana, cherry.\n",
)


def tiny_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Returns the tokenizer: ids 0..4 are ``SPECIAL``, then the 256 bytes, then merges; any UTF-8 text round trips."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Lets a tiny tokenizer put BOS before every text by itself, as Llama's and Gemma's do; returns it."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return tokenizer
