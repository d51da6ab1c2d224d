"""The picture of the decoding order, from steps made by hand."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.text import Text

import s2d2_lmeval
from s2d2_lmeval.decoding.generation import ACCEPTED, DENOISED, HIGH_CONFIDENCE, KEPT, RATIO, RESAMPLED, Step
from s2d2_lmeval.picture import State, picture, read_steps, visible

M, STOP = 99, 98
WORDS = {1: "The", 2: " cat", 3: "\n", 4: " sat", 5: "日本", 6: "on"}


def word(token: int) -> str:
    return WORDS[token]


def draw(steps: list[Step], **options: object) -> list[str]:
    settings = {"mask_token_id": M, "prompt_length": 5, "width": 80, "color": False, **options}
    return [line.plain for line in picture(steps, word, **settings)]


DRAFT = Step("draft", 4, [1, M, M, M], [1, 2, 3, 4], [1, M, M, M], [0, 0, 0, 0])
VERIFY = Step("verify", 4, [1, M, M, M], [1, 2, 3, 4], [1, 2, 6, M], [0, ACCEPTED, RESAMPLED, 0])
FALLBACK = Step("draft", 4, [1, 2, 6, M], [1, 2, 6, 4], [1, 2, 6, 4], [0, 0, 0, DENOISED])


def test_each_step_is_a_line_and_columns_stand_below_each_other() -> None:
    lines = draw([DRAFT, VERIFY, FALLBACK])
    assert [line.rstrip() for line in lines[:4]] == [
        "                 positions 4-7",
        " 1  draft      │ :The ?␣cat ?⏎  ?␣sat",
        " 2  verify 1/3 │ :The +␣cat ~on  ·",
        " 3  draft +1   │ :The  ␣cat  on *␣sat",
    ]


def test_the_legend_explains_what_occurs_and_nothing_else() -> None:
    lines = draw([DRAFT, VERIFY, FALLBACK])
    named = [line.split()[0] for line in lines[5:]]
    assert named == [":prompt", "earlier", "·", "?drafted", "+accepted", "~resampled", "*denoised"]
    assert draw([VERIFY])[-1].split()[0] == "~resampled"


def test_a_draft_that_nobody_verifies_shows_only_what_it_decides() -> None:
    states = [state for state, _ in read_steps([DRAFT, FALLBACK], word, M, 5)[0].cells]
    assert states == [State.PROMPT, State.MASK, State.MASK, State.MASK]


@pytest.mark.parametrize(
    ("mark", "state"),
    [
        (ACCEPTED, State.ACCEPTED),
        (RESAMPLED, State.RESAMPLED),
        (RATIO, State.RATIO),
        (HIGH_CONFIDENCE, State.CONFIDENT),
        (DENOISED, State.DENOISED),
        (KEPT, State.KEPT),
    ],
)
def test_every_way_to_decide_a_token_has_its_state(mark: int, state: State) -> None:
    step = Step("verify", 0, [M], [1], [1], [mark])
    assert read_steps([step], word, M, 0)[0].cells == ((state, "The"),)


def test_states_differ_in_symbol_and_in_style() -> None:
    assert len({state.symbol for state in State if state is not State.MASK and state is not State.EARLIER}) == 11
    assert len({state.style for state in State} - {"", "dim"}) == len(State) - 3


def test_an_edit_of_a_decided_token_shows() -> None:
    step = Step("draft", 0, [1, 2], [1, 2], [1, 4], [0, 0])
    assert [state for state, _ in read_steps([step], word, M, 0)[0].cells] == [State.EARLIER, State.EDITED]


def test_with_colour_styles_tell_states_apart_and_symbols_are_gone() -> None:
    lines = picture([DRAFT, VERIFY], word, mask_token_id=M, prompt_length=5, width=80, color=True)
    verify = next(line for line in lines if "verify" in line.plain)
    assert "+" not in verify.plain
    styles = {verify.plain[span.start : span.end].strip(): str(span.style) for span in verify.spans}
    assert styles["␣cat"] == State.ACCEPTED.style
    assert styles["on"] == State.RESAMPLED.style
    assert styles["·"] == State.MASK.style


def test_a_stop_token_has_a_sign_of_its_own() -> None:
    step = Step("verify", 0, [M, M], [1, STOP], [1, STOP], [ACCEPTED, ACCEPTED])
    lines = draw([step], stop_token_ids=[STOP], prompt_length=0)
    assert lines[1].rstrip().endswith("+The +■")
    assert lines[-1].split() == ["■", "a", "stop", "token"]


def test_blocks_have_headings_and_single_tokens_have_none_of_their_own() -> None:
    second = Step("draft", 8, [M, M, M, M], [1, 1, 1, 1], [1, 1, 1, 1], [DENOISED] * 4)
    assert [line.strip() for line in draw([FALLBACK, second]) if "position" in line] == [
        "positions 4-7",
        "positions 8-11",
    ]
    one_by_one = [Step("draft", place, [M], [1], [1], [DENOISED]) for place in range(3)]
    assert sum("position" in line for line in draw(one_by_one)) == 1


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("color", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, color: bool) -> None:
    tokens = [1, 5, 2, 4] * 8
    step = Step("draft", 32, [M] * 32, tokens, tokens, [DENOISED] * 32)
    lines = picture([step], word, mask_token_id=M, prompt_length=0, width=width, color=color)
    drawn: list[Text] = [line for line in lines if "│" in line.plain or "position" in line.plain]
    assert all(cell_len(line.plain.rstrip()) <= width for line in drawn)
    assert sum(line.plain.count("␣cat") for line in drawn) == 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a\tb\r\n", "␣a⇥b␍⏎"),
        ("\x00", "\\x00"),
        ("", ""),
        ("abcdefghijklmnop", "abcdefghijklm…"),
        ("日本語日本語日本語", "日本語日本語…"),
    ],
)
def test_blanks_and_controls_are_visible_and_long_texts_are_cut(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert cell_len(visible(text)) <= 14


def test_nothing_to_show() -> None:
    assert draw([]) == []


def test_a_model_draws_an_answer_for_terminals_and_notebooks() -> None:
    model = s2d2_lmeval.load("toy", device="cpu")
    (answer,) = model.generate(["3 + 4 ="], {"decoder": "s2d2", "block_length": 8}, max_new_tokens=16)
    plain, drawn = str(model.draw(answer, color=False)), model.draw(answer)
    assert "verify" in plain
    assert "+" in plain
    assert ":3" in plain.replace(" ", "")  # the prompt's tokens are marked as given
    page = drawn._repr_html_()
    assert page.startswith("<pre")
    assert "background-color" in page
    assert "accepted" in page
    assert repr(drawn) == str(drawn)
