"""Text: normalising, containment, neutralising outside text, templates."""

import pytest
from helpers import HOSTILE, make_tokenizer

from plumbing.cli import UserError
from plumbing.text import (CONTROL_TAG, contains_answer, encode, fill, load_prompts, neutralize,
                           normalize_answer, prompt_ids)


def test_normalisation_is_squads():
    assert normalize_answer("  The  Eiffel-Tower, a (tower)! ") == "eiffeltower tower"
    assert normalize_answer("An apple\tand\nthe pear") == "apple and pear"


def test_containment_is_by_whole_words():
    assert contains_answer("It is the Mexican peso.", ["mexican peso"])
    assert not contains_answer("It was 1999.", ["9"])  # the official code matches substrings
    assert not contains_answer("anything", ["", "the", "!?"])  # normalised, nothing is left


@pytest.mark.parametrize("text", HOSTILE)
def test_neutralised_text_can_not_control_anything(tokenizer, text):
    safe = neutralize(text, tokenizer)
    assert not CONTROL_TAG.search(safe)
    assert "\n" not in safe and "\x1b" not in safe
    assert not set(tokenizer.all_special_ids) & set(encode(tokenizer, safe))
    assert neutralize(safe, tokenizer) == safe


def test_harmless_text_is_left_alone(tokenizer):
    text = "Zürich (CH): 5 < 6 > 4, {k} 東京 – “quoted” & <b>bold</b>"
    assert neutralize(text, tokenizer) == text


def test_prompt_values_are_filled_once():
    template = "Q: {question} A: {answer}"
    assert fill(template, question="{answer}", answer="42") == "Q: {answer} A: 42"


def test_a_prompt_without_a_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = None, "<|im_start|>"
    text = tokenizer.decode(prompt_ids(tokenizer, "be brief", "who?", start="It is"))
    assert text == "<|im_start|>be brief\n\nwho?\n\nIt is"
    tokenizer.bos_token = None
    assert tokenizer.decode(prompt_ids(tokenizer, "", "who?")) == "who?\n\n"


def test_a_prompts_file_rewords_and_refuses_unknown_names(tmp_path):
    custom = tmp_path / "mine.toml"
    custom.write_text('[simulator]\nheading = "OUT {quality}:"\n')
    prompts, own = load_prompts(), load_prompts(custom)
    prompts["simulator"]["heading"] = "OUT {quality}:"
    assert own == prompts
    custom.write_text('[simulator]\nheadng = "x"\n')
    with pytest.raises(UserError, match="simulator.headng"):
        load_prompts(custom)
