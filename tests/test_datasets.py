"""Drawn prompts hold what their roles and answers say, on tokenizers that split other words."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny
import torch

from patching_demo import capital_task, ioi_task, prompt_task, sweep
from patching_demo.tasks import IOI_PROMPTS

WORDS = (
    "When After While Last week and went to the had lunch at were on way home from met in front of "
    "Before it was dark gave a Mary John Tom Anna Paul Alice park school market ball book cup key "
    "The capital France Italy Spain is Question what Answer On every map city called Paris Rome"
)


@pytest.fixture
def model():
    return tiny.of_words(WORDS)


def text_of(task, which, prompt):
    """The tokens of a prompt, without the answer that may follow."""
    row = prompt * task.rows_per_prompt
    strings = {"clean": task.clean_strings, "corrupted": task.corrupted_strings}[which][row]
    return strings[: int(task.roles["END"][which == "corrupted"][row]) + 1]


def at(task, role, which, prompt):
    """The token at a role's place in a prompt."""
    place = task.roles[role][which == "corrupted"][prompt * task.rows_per_prompt]
    return text_of(task, which, prompt)[int(place)]


def answers_of(task, model, prompt):
    return [model.tokenizer.decode([token]) for token in task.answers[prompt].tolist()]


@pytest.mark.parametrize("n", [1, 8, 9, 40])
def test_roles_of_ioi_prompts_are_the_words_they_name(n):
    model = tiny.of_words(WORDS) if n != 8 else tiny.model("gpt2")
    task = ioi_task(model, n=n)
    assert len(task) == n and list(task.roles) == ["IO", "S1", "S2", "END"]
    for prompt in range(n):
        right, wrong = answers_of(task, model, prompt)
        for which, second in (("clean", wrong), ("corrupted", right)):
            words = text_of(task, which, prompt)
            assert words[0] == "<bos>" and words[-1] == " to"
            found = {role: at(task, role, which, prompt) for role in task.roles}
            assert found == {"IO": right, "S1": wrong, "S2": second, "END": " to"}
            places = {role: int(task.roles[role][which == "corrupted"][prompt]) for role in found}
            assert places["S2"] > max(places["IO"], places["S1"])
            assert Counter(words)[second] == 2 and places["END"] == len(words) - 1
        # Nothing else differs within a pair.
        clean, corrupted = (text_of(task, which, prompt) for which in ("clean", "corrupted"))
        differs = [
            i for i, pair in enumerate(zip(clean, corrupted, strict=True)) if len({*pair}) > 1
        ]
        assert differs == [int(task.roles["S2"][0][prompt])]


def test_eight_prompts_are_those_of_the_table_whatever_the_seed():
    model = tiny.model("gpt2")
    for seed in (0, 1):
        task = ioi_task(model, seed=seed)
        assert ["".join(words[1:]) for words in task.clean_strings] == list(IOI_PROMPTS)


def test_drawn_prompts_are_balanced_differ_and_follow_from_the_seed(model):
    task, again = ioi_task(model, n=48, seed=3), ioi_task(model, n=48, seed=3)
    assert torch.equal(task.clean_tokens, again.clean_tokens)
    assert torch.equal(task.corrupted_tokens, again.corrupted_tokens)
    assert not torch.equal(task.clean_tokens, ioi_task(model, n=48, seed=4).clean_tokens)
    # A shorter draw is the beginning of a longer one.
    shorter = ioi_task(model, n=12, seed=3)
    assert [text_of(shorter, "clean", i) for i in range(12)] == [
        text_of(task, "clean", i) for i in range(12)
    ]
    texts = {"".join(text_of(task, "clean", i)) for i in range(48)}
    assert len(texts) == 48
    abba = (task.roles["IO"][0] < task.roles["S1"][0]).tolist()
    assert sum(abba) == 24
    # In each template both orders come equally often, and templates have several lengths.
    by_length = Counter(zip(task.lengths.tolist(), abba, strict=True))
    assert len(set(task.lengths.tolist())) > 1
    for length in set(task.lengths.tolist()):
        assert by_length[length, True] == by_length[length, False]


def test_names_places_and_things_are_single_tokens(model):
    task = ioi_task(model, n=40)
    things, places = Counter(), Counter()
    for prompt in range(40):
        words = text_of(task, "clean", prompt)
        things[words[-2]] += 1
        places.update(word for word in words if word in (" park", " school", " market"))
    assert set(things) <= {" ball", " book", " cup", " key", " map"} and len(things) > 3
    assert set(places) == {" park", " school", " market"} and places.total() == 40


def test_too_few_words_are_refused_with_how_many_there_are(model):
    with pytest.raises(ValueError, match="6 names, 3 places and 5 things .* make 3600"):
        ioi_task(model, n=3601)
    with pytest.raises(ValueError, match="0 names, 0 places and 0 things"):
        ioi_task(tiny.of_words(""), n=2)
    with pytest.raises(ValueError, match="no tokenizer"):
        ioi_task(tiny.model("attn-only"), n=2)


def test_every_prompt_that_there_is_can_be_drawn():
    model = tiny.of_words("Mary John park ball")
    task = ioi_task(model, n=16)
    assert len({"".join(text_of(task, "clean", i)) for i in range(16)}) == 16
    with pytest.raises(ValueError, match="make 16"):
        ioi_task(model, n=17)


@pytest.mark.parametrize("make", [ioi_task, capital_task])
@pytest.mark.parametrize(("name", "value"), [("n", 0), ("n", 2.5), ("n", True), ("seed", -1)])
def test_numbers_that_are_none_are_refused(model, make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        make(model, **{name: value})


def test_capitals_are_those_of_the_countries(model):
    task = capital_task(model)
    texts = {which: ["".join(text_of(task, which, i)[1:]) for i in range(len(task))]
             for which in ("clean", "corrupted")}  # fmt: skip
    assert len(set(texts["clean"])) == len(task) > 40
    assert not task.same_lengths and len(set(task.lengths.tolist())) > 5
    france = [i for i, text in enumerate(texts["clean"]) if "France" in text]
    assert len(france) == 1
    (i,) = france
    row = i * task.rows_per_prompt
    assert model.tokenizer.decode([int(task.answers[row, 0])]) == " Paris"
    assert at(task, "subject", "clean", i) == " France"
    for clean, corrupted in zip(texts["clean"], texts["corrupted"], strict=True):
        # The same template: only the country is another.
        assert clean != corrupted
        assert clean.split()[0] == corrupted.split()[0]
        assert clean.split()[-1] == corrupted.split()[-1]


def test_capitals_follow_from_the_seed_and_come_again_in_other_templates(model):
    longest = capital_task(model, n=120, seed=1)
    again = capital_task(model, n=120, seed=1)
    assert torch.equal(longest.clean_tokens, again.clean_tokens)
    assert torch.equal(longest.corrupted_tokens, again.corrupted_tokens)
    texts = {"".join(text_of(longest, "clean", i)) for i in range(120)}
    assert len(texts) == 120
    with pytest.raises(ValueError, match="n must be at most 1"):
        capital_task(model, n=1000)


def test_drawn_prompts_sweep_by_role_in_any_order(model):
    for task in (ioi_task(model, n=9), capital_task(model, n=5)):
        found = sweep(model, task, "resid_pre", by="role", per_prompt=True, progress=False)
        order = list(range(len(task)))[::-1]
        turned = sweep(
            model, task.select(order), "resid_pre", by="role", per_prompt=True, progress=False
        )
        np.testing.assert_allclose(turned, found[order], atol=1e-4)
        if "IO" in task.roles:
            assert found.agrees.values.tolist() == [True, True, False, False]


def test_prompts_in_the_chat_template(model):
    asked = "what is the capital of France"
    other = "what is the capital of Italy"
    task = prompt_task(
        model, asked, other, (" Paris", " Rome"), roles={"subject": ("of France", "of Italy")},
        chat=True,
    )  # fmt: skip
    for which, question, country in (("clean", asked, " France"), ("corrupted", other, " Italy")):
        words = text_of(task, which, 0)
        assert words.count("<bos>") == 1
        assert "".join(words) == f"<bos>[user] {question}\n[assistant]"
        assert at(task, "subject", which, 0) == country
        assert "".join(words).endswith(at(task, "END", which, 0))
    with pytest.raises(ValueError, match="no chat template"):
        prompt_task(tiny.model("gpt2"), "The cat", "The dog", (" sat", " ran"), chat=True)
    with pytest.raises(TypeError, match="as text"):
        prompt_task(model, [[0, 5]], [[0, 6]], (7, 8), chat=True)
