"""The tokenizer of the toy model: a small byte-level BPE with single-digit numbers, and the chat format."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.toy.problems import training_stream
from s2d2_lmeval.toy import CORPORA, Problem

END_OF_TEXT, TURN_START, TURN_END, MASK = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")
VOCABULARY_SIZE = 640
CONTEXT_LENGTH = 512
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}\n"
)

_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLES_PER_CORPUS = 8000


def chat_prompt(prompt: str) -> str:
    """What the chat template renders for one user turn, ready for the answer."""
    return f"{TURN_START}user\n{prompt}{TURN_END}\n{TURN_START}assistant\n"


def render(problem: Problem, chat: bool) -> tuple[str, str]:
    """(prompt, answer) as the model sees them: with the chat format, or raw and joined by the corpus' separator."""
    if chat:
        return chat_prompt(problem.prompt), problem.answer
    return problem.prompt, problem.separator + problem.answer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a token that the tokenizer must have."""
    identity = tokenizer.token_to_id(token)
    if identity is None:
        raise ValueError(f"the tokenizer has no token {token}; was it made by this recipe?")
    return int(identity)


def train_tokenizer(seed: int) -> Tokenizer:
    """Train the BPE on samples of all corpora. Digits are never merged; the special tokens come last."""
    texts = ["user\nassistant\n"] * _SAMPLES_PER_CORPUS
    for name in CORPORA:
        for index, problem in enumerate(islice(training_stream(name, seed), _SAMPLES_PER_CORPUS)):
            prompt, answer = render(problem, chat=False)
            texts.append(prompt + answer if index % 2 else f"{problem.prompt}\n{problem.answer}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` for ``AutoTokenizer``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "additional_special_tokens": [TURN_START],
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
