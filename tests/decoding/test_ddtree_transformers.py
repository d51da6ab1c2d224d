"""The same drafter and target under transformers' own DFlash loop: the same tokens, accepted round by round alike."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import GenerationConfig, Qwen3ForCausalLM
from transformers.generation import candidate_generator

from s2d2_lmeval import load
from s2d2_lmeval.runtime.drafting.dflash import DFlash
from s2d2_lmeval.runtime.drafting.loading import load_drafter

from .ddtree_recorded import DATA, STOP

transformers = pytest.importorskip("transformers.models.muse_glimmer_assistant")
if not hasattr(candidate_generator, "DFlashTokenCandidateGenerator"):
    pytest.skip("this release of transformers has no DFlash", allow_module_level=True)


def as_assistant(drafter: DFlash) -> Any:
    """The drafter as transformers' assistant class, which names the fusion otherwise."""
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    shape, config = drafter.shape, drafter.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "vocab_size")
    sizes = {name: getattr(config, name) for name in names}
    assistant = MuseGlimmerAssistantModel(
        MuseGlimmerAssistantConfig(
            **sizes,
            layer_types=["full_attention"] * config.num_hidden_layers,
            block_size=shape.block_length,
            mask_token_id=shape.mask_token_id,
            target_layer_ids=list(shape.layer_ids),
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), STOP),
        )
    )
    moved = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    weights = {moved.get(name, name): weight for name, weight in drafter.state_dict().items()}
    assistant.load_state_dict(weights)
    return assistant.eval()


@pytest.mark.parametrize("prompt", [[3, 1, 4, 1, 5, 9, 2, 6], [12, 40, 7], list(range(20, 33))])
def test_rounds_equal_those_of_transformers(prompt: list[int]) -> None:
    plain = Qwen3ForCausalLM.from_pretrained(DATA / "target").eval()
    assistant, lengths = as_assistant(load_drafter(DATA / "draft", plain)), []
    propose = candidate_generator.DFlashTokenCandidateGenerator.get_candidates

    def proposing(self: Any, input_ids: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return propose(self, input_ids, *arguments, **more)

    settings = GenerationConfig(
        max_new_tokens=60, do_sample=False, eos_token_id=STOP, pad_token_id=STOP, speculation_type="dflash"
    )
    with patch.object(candidate_generator.DFlashTokenCandidateGenerator, "get_candidates", proposing):
        ids = torch.tensor([prompt])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, generation_config=settings
        )
    theirs = [after - before for before, after in pairwise(lengths[1:])]

    model = load(plain, draft=DATA / "draft")
    options = {"decoder": "dflash", "schedule": "reference", "stop_token_ids": (STOP,)}
    answer = model.generate([prompt], options, max_new_tokens=60)[0]
    assert answer.token_ids == out[0, len(prompt) :].tolist()
    ours = [len(step.tokens) for step in answer.steps[1:]]
    assert max(theirs) > 4
    assert ours[: len(theirs)] == theirs, "but for the last round, which transformers cuts at the limit"
