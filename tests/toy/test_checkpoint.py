"""The checkpoint that ships with the package."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from recipes.toy.export import load_network
from recipes.toy.tokenization import chat_prompt, render
from s2d2_lmeval.toy import CORPORA, checkpoint_path, held_out, score

FOLDER = checkpoint_path()
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "training_log.jsonl", "README.md", "LICENSE.txt",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    fields = json.loads((FOLDER / "config.json").read_text())
    del fields["model_type"]
    model, report = Qwen3ForCausalLM.from_pretrained(
        FOLDER, config=Qwen3Config(**fields), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def test_folder_is_complete_and_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * 2**20


def test_configuration_agrees_with_the_tokenizer(tokenizer) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "sdar"
    assert config["vocab_size"] == len(tokenizer)
    assert config["mask_token_id"] == tokenizer.mask_token_id == tokenizer.convert_tokens_to_ids("<|MASK|>")
    assert config["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config["pad_token_id"] == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.eos_token_id in json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("name", tuple(CORPORA))
def test_tokenizer_round_trip(tokenizer, name: str) -> None:
    for problem in held_out(name):
        for chat in (False, True):
            prompt, answer = render(problem, chat)
            ids = tokenizer.encode(prompt) + tokenizer.encode(answer)
            assert tokenizer.decode(ids) == prompt + answer
            assert len(ids) <= 110
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 🙂")) == "naïve 漢字 🙂"


def test_digits_are_single_tokens(tokenizer) -> None:
    tokens = tokenizer.tokenize("x 1234567890+99")
    assert [token for token in tokens if token.strip("Ġ").isdigit()] == list("123456789099")


def test_chat_template_renders_what_the_training_saw(tokenizer) -> None:
    prompt = held_out("programs")[0].prompt
    messages = [{"role": "user", "content": prompt}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat_prompt(prompt)


def test_training_network_and_native_class_agree(model) -> None:
    network = load_network(FOLDER)
    tokens = torch.arange(1, 25)[None]
    positions = torch.arange(24)[None]
    visible = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        ours = network(tokens, positions, visible, torch.ones(1, 24, dtype=torch.bool))
        native = model(tokens).logits[0]
    torch.testing.assert_close(ours, native, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def left_to_right(model, prompt: list[int], mask: int, end: int) -> list[int]:
    """Greedy decoding at block size 1: the token at a position is read from a mask at that very position."""
    text, limit = list(prompt), len(prompt) + 64
    while len(text) < limit:
        logits = model(torch.tensor([[*text, mask]]), logits_to_keep=1).logits[0, -1]
        logits[mask] = -torch.inf
        token = int(logits.argmax())
        if token == end:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize("name", tuple(CORPORA))
@pytest.mark.parametrize("chat", [False, True])
def test_left_to_right_decoding_solves_problems(model, tokenizer, name: str, chat: bool) -> None:
    problems = [problem for problem in held_out(name) if problem.kind != "distinct"][:5]  # many right answers: hard
    right = 0.0
    for problem in problems:
        prompt = tokenizer.encode(render(problem, chat)[0])
        response = left_to_right(model, prompt, tokenizer.mask_token_id, tokenizer.eos_token_id)
        right += score(problem, tokenizer.decode(response))
    assert right >= 4
