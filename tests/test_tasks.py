"""Tasks hold what they say, and mistakes in prompts and answers are refused with the remedy."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from patching_demo.engine import checks
from patching_demo.metrics import LogitDifference, reads
from patching_demo.sweeps import question, sweep, sweep_metrics
from patching_demo.tasks import (
    CORRUPTIONS,
    IOI_ANSWERS,
    IOI_PROMPTS,
    METRICS,
    Task,
    induction_task,
    ioi_task,
    prompt_task,
)

RIGHT_WRONG = (" Mary", " John")
CLEAN, CORRUPTED = "John gave the bag to", "Mary gave the bag to"
WITH_TOKENIZER = [name for name in tiny.NAMES if name != "attn-only"]


@pytest.fixture
def model():
    return tiny.model("gpt2")


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_ioi_task_holds_the_eight_prompts_swapped_in_pairs(name):
    model = tiny.model(name)
    task = ioi_task(model)
    assert torch.equal(task.clean_tokens, model.to_tokens(list(IOI_PROMPTS)))
    swap = [1, 0, 3, 2, 5, 4, 7, 6]
    assert torch.equal(task.corrupted_tokens, task.clean_tokens[swap])
    assert task.clean_tokens.dtype == torch.int64
    by_name = [[model.to_single_token(a) for a in pair] for pair in IOI_ANSWERS]
    assert task.answers.tolist() == by_name
    # Every answer is in its prompt, and the wrong one is the subject that is named twice.
    for prompt, (right, wrong) in zip(IOI_PROMPTS, IOI_ANSWERS, strict=True):
        assert (prompt.count(right.strip()), prompt.count(wrong.strip())) == (1, 2)
    assert len(set(IOI_PROMPTS)) == 8
    # Swapping within pairs swaps the answers, so the corrupted baseline is the clean one's mirror.
    assert task.corrupted_baseline == pytest.approx(-task.clean_baseline, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_baselines_are_the_metric_on_both_runs(model, metric):
    task = ioi_task(model, metric=metric)
    with torch.no_grad():
        assert float(task.metric(model(task.clean_tokens))) == task.clean_baseline
        assert float(task.metric(model(task.corrupted_tokens))) == task.corrupted_baseline
    assert task.metric.name == metric
    again = ioi_task(model).with_metric(model, metric)
    assert (again.clean_baseline, again.corrupted_baseline) == (
        task.clean_baseline,
        task.corrupted_baseline,
    )


def test_normalised_task_is_one_clean_and_zero_corrupted(model):
    task = ioi_task(model).normalised()
    assert (task.clean_baseline, task.corrupted_baseline) == (1.0, 0.0)
    with torch.no_grad():
        assert float(task.metric(model(task.clean_tokens))) == pytest.approx(1.0, abs=1e-5)
        assert float(task.metric(model(task.corrupted_tokens))) == pytest.approx(0.0, abs=1e-5)


def test_labels_are_unique_and_name_token_and_position(model):
    task = ioi_task(model)
    assert task.position_labels[0] == "<bos> 0"
    assert task.position_labels[10] == "John 10"
    assert task.position_tokens[10] == " John"
    assert len(set(task.position_labels)) == task.clean_tokens.shape[1]
    assert task.agree_until == 10
    assert "indirect object" in repr(task) and "8 prompt" in repr(task)


def test_labels_of_line_ends_and_spaces_can_be_seen(model):
    task = prompt_task(model, "The\n bag", "The\n ball", (" Mary", " John"))
    assert task.position_labels[2] == "\\n 2"


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("corrupted", CORRUPTIONS)
def test_induction_task_is_made_of_the_copies_it_names(name, corrupted):
    model = tiny.model(name)
    length = 6
    task = induction_task(model, corrupted, batch=3, seq_len=length)
    reference = induction_task(model, "BC", batch=3, seq_len=length)
    copies = {
        "A": task.clean_tokens[:, 1 : length + 1],
        "B": reference.corrupted_tokens[:, 1 : length + 1],
        "C": reference.corrupted_tokens[:, length + 1 :],
    }
    for tokens, spelling in ((task.clean_tokens, "AA"), (task.corrupted_tokens, corrupted)):
        first, second = tokens[:, 1 : length + 1], tokens[:, length + 1 :]
        assert torch.equal(first, copies[spelling[0]]) and torch.equal(second, copies[spelling[1]])
        assert len(set(tokens[:, 0].tolist())) == 1
    # Within a row no random token occurs twice, and none is special.
    for row in torch.cat(list(copies.values()), dim=1).tolist():
        assert len(set(row)) == 3 * length
        assert task.clean_tokens[0, 0].item() not in row


def test_induction_metric_is_the_mean_log_probability_of_the_second_copy():
    model = tiny.model("attn-only")
    length = 5
    task = induction_task(model, batch=2, seq_len=length)
    with torch.no_grad():
        log_probs = model(task.clean_tokens).log_softmax(-1)
    each = [
        log_probs[row, place, task.clean_tokens[row, place + 1]].item()
        for row in range(2)
        for place in range(length + 1, 2 * length)
    ]
    assert task.clean_baseline == pytest.approx(sum(each) / len(each), abs=1e-5)
    assert task.metric.units == "nats"
    assert task.position_labels[:3] == ["BOS 0", "A1 1", "A2 2"]
    assert task.position_labels[-1] == f"A{length} {2 * length}"


def test_induction_is_the_same_for_the_same_seed_and_leaves_torchs_generator_alone():
    model = tiny.model("attn-only")
    state = torch.random.get_rng_state()
    one, same, other = (induction_task(model, seed=s, seq_len=5) for s in (3, 3, 4))
    assert torch.equal(one.clean_tokens, same.clean_tokens)
    assert one.clean_baseline == same.clean_baseline
    assert not torch.equal(one.clean_tokens, other.clean_tokens)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_induction_in_a_small_vocabulary_repeats_tokens_only_between_copies():
    inner = tiny.model("attn-only")
    small = _standing_in(inner, d_vocab=12)
    task = induction_task(small, "BC", batch=2, seq_len=8)
    for half in task.corrupted_tokens[:, 1:].split(8, dim=1):
        assert all(len(set(row)) == 8 for row in half.tolist())
    with pytest.raises(
        ValueError, match=r"more distinct tokens than this vocabulary offers \(11\)"
    ):
        induction_task(small, seq_len=11)


def test_induction_draws_from_the_middle_of_a_large_vocabulary():
    large = _standing_in(tiny.model("attn-only"), d_vocab=50_000, logits=True)
    tokens = induction_task(large, seq_len=20, batch=4).clean_tokens[:, 1:]
    assert tokens.min() >= 100 and tokens.max() < 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupted": "AA"}, "AB, BA, BB, BC"),
        ({"batch": 0}, "batch"),
        ({"batch": 2.5}, "batch"),
        ({"seq_len": 1}, "first token of the second copy"),
        ({"seq_len": 32}, "at most 31"),
    ],
)
def test_induction_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        induction_task(tiny.model("attn-only"), **options)


def test_own_prompts_as_text_tokens_or_arrays_make_the_same_task(model):
    text = prompt_task(model, CLEAN, CORRUPTED, RIGHT_WRONG)
    assert text.clean_tokens.tolist() == model.to_tokens(CLEAN).tolist()
    ids = [model.to_single_token(a) for a in RIGHT_WRONG]
    for convert in (
        lambda t: t,
        lambda t: t.int(),
        np.asarray,
        lambda t: t.tolist(),
        lambda t: t[0],
    ):
        same = prompt_task(model, *(convert(model.to_tokens(p)) for p in (CLEAN, CORRUPTED)), ids)
        assert torch.equal(same.clean_tokens, text.clean_tokens)
        assert same.clean_tokens.dtype == torch.int64
        assert same.clean_baseline == text.clean_baseline


def test_one_pair_of_answers_serves_all_prompts(model):
    clean, corrupted = [CLEAN, CORRUPTED], [CORRUPTED, CLEAN]
    one = prompt_task(model, clean, corrupted, [RIGHT_WRONG])
    each = prompt_task(model, clean, corrupted, [RIGHT_WRONG, RIGHT_WRONG])
    assert torch.equal(one.answers, each.answers)


@pytest.mark.parametrize("answers", [RIGHT_WRONG, list(RIGHT_WRONG), torch.tensor([9, 11])])
@pytest.mark.parametrize("metric", ["probability", "logit difference"])
def test_two_answers_for_two_prompts_are_refused_with_both_readings(model, answers, metric):
    """They may be (right, wrong) for both, or one right answer each."""
    with pytest.raises(ValueError) as refusal:
        prompt_task(model, [CLEAN, CORRUPTED], [CORRUPTED, CLEAN], answers, metric=metric)
    assert "one (right, wrong) pair for both" in str(refusal.value)
    assert "one right answer each" in str(refusal.value)


ONES = (np.int64, np.uint16, np.asarray, torch.tensor)


@pytest.mark.parametrize(
    "convert",
    [np.asarray, torch.tensor, *(lambda ids, one=one: [*map(one, ids)] for one in ONES)],
)
def test_answers_may_be_ids_of_any_kind(model, convert):
    ids = [model.to_single_token(a) for a in RIGHT_WRONG]
    assert prompt_task(model, CLEAN, CORRUPTED, convert(ids)).answers.tolist() == [ids]
    both = prompt_task(model, [CLEAN] * 2, [CORRUPTED] * 2, [convert(ids)] * 2)
    assert both.answers.tolist() == [ids] * 2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_text_that_has_its_bos_gets_no_other_and_that_is_said_once(name):
    """As chat templates write it."""
    model = tiny.model(name)
    checks._warned.clear()
    with pytest.warns(UserWarning, match="the prompts begin with '<bos>' already") as caught:
        for _ in range(2):
            task = prompt_task(model, "<bos>" + CLEAN, "<bos>" + CORRUPTED, RIGHT_WRONG)
    assert len(caught) == 1
    assert torch.equal(task.clean_tokens, model.to_tokens(CLEAN))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_output_is_read_by_its_mask(model, side):
    """Whatever the pads are; here they are a word that ends one of the prompts, too."""
    clean = [CLEAN, CLEAN + " the to"]
    corrupted = [text.replace("John", "Mary") for text in clean]
    wanted = prompt_task(model, clean, corrupted, [RIGHT_WRONG])
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = " to", side
    made = [tokenizer(texts, padding=True, return_tensors="pt") for texts in (clean, corrupted)]
    assert (made[0]["input_ids"][0] == tokenizer.pad_token_id).sum() == 3
    task = prompt_task(model, *made, [RIGHT_WRONG])
    assert torch.equal(task.clean_tokens, wanted.clean_tokens)
    assert task.lengths.tolist() == wanted.lengths.tolist()
    assert task.clean_baseline == wanted.clean_baseline
    unpadded = prompt_task(model, tokenizer(clean), tokenizer(corrupted), [RIGHT_WRONG])
    assert torch.equal(unpadded.clean_tokens, wanted.clean_tokens)


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_a_prompt_that_ends_in_the_token_that_pads_keeps_it(form):
    model = tiny.fresh("gpt2")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.pad_token = "<bos>"  # It ends texts, too.
    prompts = [CLEAN + "<bos>", CORRUPTED + "<bos>"]
    length = model.to_tokens(prompts[0]).shape[1]
    if form == "tokens":
        prompts = [model.to_tokens(prompt) for prompt in prompts]
    task = prompt_task(model, *prompts, RIGHT_WRONG)
    assert task.lengths.tolist() == [length]
    assert task.metric.positions.tolist() == [[length - 1]]
    found = sweep(model, task, "resid_pre", progress=False)
    assert found.sizes["position"] == length and found.std() > 0
    checks._warned.clear()
    # Of two prompts, one of which ends in it once, it is text, aloud; more of them are refused.
    tokens = [model.to_tokens([text, text + " the"]) for text in (CLEAN, CORRUPTED)]
    with pytest.warns(UserWarning, match="some clean prompts end in token 0"):
        mixed = prompt_task(model, *tokens, [RIGHT_WRONG])
    assert mixed.lengths.tolist() == [length, length]
    tokens = [model.to_tokens([text, text + " the bag"]) for text in (CLEAN, CORRUPTED)]
    with pytest.raises(ValueError, match="clean tokens end in several of token 0"):
        prompt_task(model, *tokens, [RIGHT_WRONG])


# ---- another model, another direction


def two_models(name):
    return tiny.model(name), tiny.fresh(name, seed=1)


@pytest.mark.parametrize("scored", ["plain", "normalised", "by two metrics"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_task_of_another_model_is_refused_with_both_numbers(name, scored):
    model, other = two_models(name)
    task, right = (ioi_task(m) for m in (model, other))
    if scored == "normalised":
        task, right = task.normalised(), right.normalised()
    with pytest.raises(ValueError, match=r"Sweep task.on\(model\)") as refusal:
        if scored == "by two metrics":
            mixed = {"right": right, "wrong": task.with_metric(model, "probability")}
            sweep_metrics(other, mixed, "resid_pre", progress=False)
        else:
            sweep(other, task, "resid_pre", progress=False)
    if scored == "plain":
        for number in (task.clean_baseline, right.clean_baseline):
            assert f"{number:.6g}" in str(refusal.value)
    moved = task.on(other)
    assert moved.clean_baseline == right.clean_baseline
    assert moved.corrupted_baseline == right.corrupted_baseline
    found, wanted = (sweep(other, t, "resid_pre", progress=False) for t in (moved, right))
    assert torch.equal(torch.tensor(found.values), torch.tensor(wanted.values))


def test_a_model_that_was_changed_since_is_another_one():
    model = tiny.fresh("gpt2")
    task = ioi_task(model)
    with torch.no_grad():
        next(iter(model.blocks[1].mlp.parameters())).mul_(1.02)
    with pytest.raises(ValueError, match="or the model was changed"):
        sweep(model, task, "out", progress=False)
    # That the clean run is as before is not enough.
    task = ioi_task(model)
    wrong = dataclasses.replace(task, corrupted_baseline=task.corrupted_baseline + 0.01)
    with pytest.raises(ValueError, match="the corrupted baseline of the task is"):
        sweep(model, wrong, "out", by="all_pos", progress=False)


def test_a_task_goes_to_no_model_that_reads_its_tokens_otherwise(model):
    other = tiny.fresh("gpt2")
    task = ioi_task(model)
    renamed = dataclasses.replace(task, clean_strings=[["?"] * 15] * 8)
    with pytest.raises(ValueError, match=r"reads '<bos>': make the task with this model"):
        renamed.on(other)
    other.cfg.d_vocab = 20
    with pytest.raises(ValueError, match="clean tokens: token id .* vocabulary of 20"):
        task.on(other)


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "llama-gqa"])
def test_a_reversed_task_patches_corrupted_activations_into_the_clean_run(name):
    model = tiny.model(name)
    task = ioi_task(model)
    back = task.reversed()
    assert (back.clean_baseline, back.corrupted_baseline) == (
        task.corrupted_baseline,
        task.clean_baseline,
    )
    assert torch.equal(back.clean_tokens, task.corrupted_tokens)
    assert back.clean_strings == task.corrupted_strings
    assert torch.equal(back.answers, task.answers)
    found = sweep(model, back, "mlp_out" if name != "neox-parallel" else "out", progress=False)
    assert found.attrs["direction"] == "noising"
    assert list(found.position.values) == task.position_labels
    with torch.no_grad():
        _, cache = model.run_with_cache(task.corrupted_tokens)
        hook = f"blocks.1.{'attn.hook_z' if 'head' in found.dims else 'hook_mlp_out'}"

        def patch(activation, hook=None):
            activation = activation.clone()
            where = (slice(None), 12, 2) if "head" in found.dims else (slice(None), 12)
            activation[where] = cache[hook.name][where]
            return activation

        value = task.metric(model.run_with_hooks(task.clean_tokens, fwd_hooks=[(hook, patch)]))
    cell = found.isel(layer=1, position=12, **({"head": 2} if "head" in found.dims else {}))
    assert float(cell) == pytest.approx(float(value), abs=1e-4)
    assert repr(back.reversed()) == repr(task) and back.reversed().direction == "denoising"


def test_reversing_and_normalising_go_in_any_order(model):
    # Not the eight prompts, whose baselines mirror each other.
    task = prompt_task(model, CLEAN, CORRUPTED, RIGHT_WRONG)
    one, other = task.reversed().normalised(), task.normalised().reversed()
    logits = torch.randn(1, 6, tiny.D_VOCAB)
    assert float(one.metric(logits)) == pytest.approx(float(other.metric(logits)), rel=1e-4)
    for each in (one, other):
        assert (each.clean_baseline, each.corrupted_baseline) == (1.0, 0.0)
        with torch.no_grad():
            assert float(each.metric(model(task.corrupted_tokens))) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", WITH_TOKENIZER)
@pytest.mark.parametrize("metric", METRICS)
def test_prompts_of_different_lengths_are_each_read_at_their_own_end(name, metric):
    model = tiny.model(name)
    clean = [CLEAN, "When John and Mary went to the shops, John gave the bag to", "John to"]
    corrupted = [p.replace("John gave", "Mary gave") for p in clean[:2]] + ["Mary to"]
    together = prompt_task(model, clean, corrupted, RIGHT_WRONG, metric=metric)
    alone = [
        prompt_task(model, a, b, RIGHT_WRONG, metric=metric)
        for a, b in zip(clean, corrupted, strict=True)
    ]
    with torch.no_grad():
        each = together.metric.per_example(model(together.clean_tokens))
    assert each.tolist() == pytest.approx([t.clean_baseline for t in alone], abs=1e-5)
    lengths = [t.clean_tokens.shape[1] for t in alone]
    assert together.lengths.tolist() == lengths and len(set(lengths)) > 1
    assert together.metric.positions.tolist() == [[n - 1] for n in lengths]
    # Labels come from the longest prompt, so that none names a pad.
    assert "<pad>" not in " ".join(together.position_labels)


def test_tokens_padded_on_the_right_are_served_and_on_the_left_refused(model):
    short, long = model.to_tokens(CLEAN)[0], model.to_tokens(CLEAN + " the cat")[0]
    pad = model.tokenizer.pad_token_id
    gap = torch.full((len(long) - len(short),), pad)
    other = [t.clone() for t in (short, long)]
    for t in other:
        t[1] = model.to_single_token("Mary")
    right = [torch.stack([torch.cat([a, gap]), b]) for a, b in ((short, long), other)]
    task = prompt_task(model, *right, [RIGHT_WRONG])
    assert task.metric.positions.tolist() == [[len(short) - 1], [len(long) - 1]]
    left = [torch.stack([b, torch.cat([gap, a])]) for a, b in ((short, long), other)]
    with pytest.raises(ValueError, match="clean prompt 2 is padded on the left"):
        prompt_task(model, *left, [RIGHT_WRONG])


@pytest.mark.filterwarnings("ignore:every")
def test_a_bos_that_is_also_the_pad_is_no_padding(model):
    tokens = model.to_tokens(CLEAN)
    both = _standing_in(model, pad_token_id=model.tokenizer.bos_token_id)
    other = tokens.clone()
    other[0, 1] = model.to_single_token("Mary")
    assert prompt_task(both, tokens, other, RIGHT_WRONG).lengths.tolist() == [tokens.shape[1]]
    many = [torch.cat([t[:, :1], t[:, :1], t], dim=1) for t in (tokens, other)]
    with pytest.raises(ValueError, match="padded on the left"):
        prompt_task(both, *many, RIGHT_WRONG)


def test_unequal_lengths_show_both_tokenisations_aligned(model):
    task = prompt_task(model, CLEAN, "John gave the the bag to", RIGHT_WRONG)
    with pytest.raises(ValueError) as refusal:
        sweep(model, task, "resid_pre", progress=False)
    message = str(refusal.value)
    assert "6 tokens" in message and "7" in message
    clean, corrupted = message.splitlines()[-2:]
    assert clean.split()[0] == "clean" and corrupted.split()[0] == "corrupted"
    assert clean.index("' gave'") == corrupted.index("' gave'")
    assert clean.count("' the'") == 1 and corrupted.count("' the'") == 2


PROMPTS = (CLEAN, CORRUPTED)


@pytest.mark.parametrize(
    ("prompts", "answers", "shown"),
    [
        ((CLEAN, CLEAN), RIGHT_WRONG, ["pair 1", "same", "' gave'"]),
        (([CLEAN] * 2, [CORRUPTED]), RIGHT_WRONG, ["2 clean and 1 corrupted"]),
        (PROMPTS, ("Mary", " John"), ["right answer", "'Mary'", "leading space", "' Mary'"]),
        (PROMPTS, (" Mary", "John"), ["wrong answer", "'John'", "leading space"]),
        (PROMPTS, (" Mary", " Mary"), ["same token", "' Mary'"]),
        (PROMPTS, (" Mary", " Zanzibar"), ["not in the tokenizer's vocabulary"]),
        (PROMPTS, (" Mary", ""), ["no token"]),
        (PROMPTS, (5, 128), ["token id 128", "vocabulary of 128"]),
        (PROMPTS, (-1, 5), ["token id -1"]),
        (([CLEAN] * 3, [CORRUPTED] * 3), ["a", "b", "c"], ["must be (right, wrong)"]),
        (([CLEAN] * 3, [CORRUPTED] * 3), [RIGHT_WRONG, "a", "b"], ["must be (right, wrong)"]),
        (PROMPTS, [RIGHT_WRONG] * 2, ["2 pairs of answers for 1 prompts"]),
        (PROMPTS, [(" Mary",)], ["(right, wrong)"]),
        ((CLEAN + " ", CORRUPTED + " "), RIGHT_WRONG, ["ends in a space", "begins with one"]),
        (("", CORRUPTED), RIGHT_WRONG, ["clean prompt 1 is empty"]),
        ((["a"], []), RIGHT_WRONG, ["no corrupted prompt"]),
        ((" the" * 64, " cat" * 64), RIGHT_WRONG, ["clean prompt 1 has 65 tokens", "64"]),
        (([[4, 5, 128]], [[4, 5, 6]]), (5, 6), ["clean tokens", "128", "vocabulary"]),
        (([[4, 5, 6]], [[4, 5, -3]]), (5, 6), ["corrupted tokens", "-3"]),
        ((torch.zeros(1, 2, 3, dtype=torch.int64),) * 2, (5, 6), ["[batch, pos]"]),
    ],
)
def test_prompts_and_answers_that_cannot_work_are_refused_with_the_tokens(
    model, prompts, answers, shown
):
    with pytest.raises(ValueError) as refusal:
        prompt_task(model, *prompts, answers)
    for part in shown:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        ((CLEAN, [CORRUPTED]), RIGHT_WRONG, "same form"),
        ((3.5, 2.5), RIGHT_WRONG, "clean prompts must be"),
        ((torch.rand(1, 3), torch.rand(1, 3)), RIGHT_WRONG, "must be whole numbers"),
        ((None, None), RIGHT_WRONG, "clean prompts must be"),
        ((["a", 3], ["b", 4]), RIGHT_WRONG, "clean tokens must be whole numbers"),
        (PROMPTS, None, "answers must be"),
        (PROMPTS, " Mary", "answers must be"),
        (PROMPTS, (None, " John"), "string or a token id"),
        (PROMPTS, [(True, False)], "string or a token id"),
        (PROMPTS, [(1.5, 2.5)], "string or a token id"),
    ],
)
def test_prompts_and_answers_of_the_wrong_kind_are_a_type_error(model, prompts, answers, message):
    with pytest.raises(TypeError, match=message):
        prompt_task(model, *prompts, answers)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, task: ioi_task(model.original_model),
        lambda model, task: induction_task(model.original_model),
        lambda model, task: prompt_task(CLEAN, CORRUPTED, model, RIGHT_WRONG),
        lambda model, task: sweep(model.original_model, task, "out"),
        lambda model, task: sweep(task, model, "out"),
        lambda model, task: sweep(model, "out", task),
        lambda model, task: task.on(model.original_model),
    ],
)
def test_a_model_that_is_no_bridge_and_arguments_in_another_order_are_a_type_error(model, call):
    with pytest.raises(TypeError, match="model must be a TransformerBridge|needs a Task"):
        call(model, ioi_task(model))


def test_an_answer_without_its_space_is_fine_where_no_space_belongs(model):
    # After a space in the prompt, in front of punctuation, or where only that form exists.
    assert prompt_task(model, CLEAN + " ", CORRUPTED + " ", ("Mary", "John"))
    assert prompt_task(model, CLEAN, CORRUPTED, (".", "!"))
    assert prompt_task(model, CLEAN, CORRUPTED, ("ing", "."))


@pytest.mark.parametrize(
    ("clean", "corrupted"),
    [
        ('John gave "', 'Mary gave "'),
        ("John gave (", "Mary gave ("),
        ("John = Mary, Mary =", "Mary = John, Mary ="),
        ("John", "Mary"),
        ("John/Mary/", "Mary/John/"),
    ],
)
def test_an_answer_may_follow_a_prompt_without_a_space(clean, corrupted):
    model = tiny.of_words("John Mary gave")
    task = prompt_task(model, clean, corrupted, ("John", "gave"))
    shown = ["".join(row).removeprefix("<bos>") for row in task.clean_strings]
    # Of an answer of several tokens, all but the last are read behind the prompt.
    assert {text[: len(clean) + 2] for text in shown} == {clean + "Jo", clean + "ga"}


@pytest.mark.parametrize("end", [" the", ",", ":", " (so)", "."])
def test_an_answer_without_its_space_is_a_slip_inside_a_sentence(end):
    model = tiny.of_words("John Mary gave")
    with pytest.raises(ValueError, match="without a leading space"):
        prompt_task(model, f"John gave{end}", f"Mary gave{end}", ("John", "Mary"))


@pytest.mark.parametrize("per_prompt", [False, True])
def test_a_function_of_all_logits_is_a_metric(model, per_prompt):
    task = ioi_task(model)
    right, wrong = task.answers.T

    def difference(logits):
        at_end = logits[torch.arange(len(logits)), task.metric.positions[:, 0]]
        return at_end.gather(1, right[:, None])[:, 0] - at_end.gather(1, wrong[:, None])[:, 0]

    own = task.with_metric(model, difference)
    assert own.clean_baseline == pytest.approx(task.clean_baseline, abs=1e-6)
    wanted, found = (
        sweep(model, one, "attn_out", per_prompt=per_prompt, progress=False) for one in (task, own)
    )
    assert np.allclose(wanted, found, atol=1e-6)
    mean = task.with_metric(model, lambda logits: difference(logits).mean())
    assert np.allclose(sweep(model, mean, "attn_out", progress=False), wanted.mean("prompt")
                       if per_prompt else wanted, atol=1e-6)  # fmt: skip


def test_what_is_no_metric_is_refused(model):
    with pytest.raises(TypeError, match="metric must be one of logit difference, .* got 3"):
        ioi_task(model).with_metric(model, 3)
    pair = prompt_task(model, CLEAN, "John gave the the bag to", RIGHT_WRONG)
    with pytest.raises(TypeError, match="says where it reads"):
        pair.with_metric(model, lambda logits: logits[:, -1, 5])


def test_a_model_without_a_tokenizer_takes_tokens_only():
    model = tiny.model("attn-only")
    task = prompt_task(model, [[0, 1, 2]], [[0, 3, 2]], (5, 6))
    assert task.position_labels == ["#0 0", "#1 1", "#2 2"]
    with pytest.raises(ValueError, match="no tokenizer"):
        prompt_task(model, "a", "b", (5, 6))
    with pytest.raises(ValueError, match="no tokenizer"):
        prompt_task(model, [[0, 1]], [[0, 2]], (" a", " b"))


def test_unknown_and_unfitting_metrics_are_refused(model):
    with pytest.raises(ValueError, match="'loss'"):
        prompt_task(model, *PROMPTS, RIGHT_WRONG, metric="loss")
    with pytest.raises(ValueError, match="right answers alone"):
        induction_task(model, seq_len=3).with_metric(model, "logit difference")
    assert induction_task(model, seq_len=3).with_metric(model, "probability").clean_baseline > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_refused_by_name(model, value):
    broken = reads([[1]], name="broken one")(lambda logits: torch.tensor([value]))
    task = prompt_task(model, *PROMPTS, RIGHT_WRONG)
    with pytest.raises(ValueError, match="'broken one' is .* clean prompts"):
        task.with_metric(model, broken)


def test_a_model_in_training_mode_is_refused():
    model = tiny.fresh("gpt2")
    model.train()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        prompt_task(model, *PROMPTS, RIGHT_WRONG)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_stays_as_it_was_and_nothing_keeps_a_graph(model, enabled):
    with torch.set_grad_enabled(enabled):
        task = prompt_task(model, *PROMPTS, RIGHT_WRONG)
        cache = task.clean_cache(model)
        assert torch.is_grad_enabled() == enabled
    assert not cache["blocks.0.hook_resid_pre"].requires_grad


def test_caches_are_of_the_run_they_are_named_for_and_can_be_narrow(model):
    task = prompt_task(model, *PROMPTS, RIGHT_WRONG)
    name = "blocks.1.attn.hook_z"
    for tokens, cache in (
        (task.clean_tokens, task.clean_cache(model, [name])),
        (task.corrupted_tokens, task.corrupted_cache(model, [name])),
    ):
        # The bridge keeps the same tensor under a second name.
        assert name in cache and not any("blocks.0" in key for key in cache)
        with torch.no_grad():
            assert torch.equal(cache[name], model.run_with_cache(tokens)[1][name])


def test_any_metric_can_score_a_task(model):
    task = prompt_task(model, *PROMPTS, RIGHT_WRONG)
    other = task.with_metric(model, LogitDifference(task.answers.flip(1), task.metric.positions))
    assert other.clean_baseline == pytest.approx(-task.clean_baseline)


def _standing_in(inner, *, d_vocab=None, pad_token_id=None, logits=False):
    """The model with another vocabulary size or pad token in what it says about itself."""

    class StandIn:
        training = False
        cfg = SimpleNamespace(
            d_vocab=d_vocab or inner.cfg.d_vocab,
            n_ctx=inner.cfg.n_ctx,
            model_name="stand-in",
        )
        modules = inner.modules
        tokenizer = None
        to_tokens = staticmethod(inner.to_tokens)

        def __call__(self, tokens, **options):
            return torch.rand(*tokens.shape, d_vocab) if logits else inner(tokens, **options)

    if pad_token_id is not None:

        class Tokenizer:
            def __getattr__(self, name):
                return getattr(inner.tokenizer, name)

        StandIn.tokenizer = Tokenizer()
        StandIn.tokenizer.pad_token_id = pad_token_id
    return StandIn()


GIVES = "When John gave the bag to", "When Mary gave the bag to"


@pytest.mark.parametrize(
    ("answers", "more", "message"),
    [
        ((" Mary ", " John"), {}, "' Mary ', which ends in a space"),
        ((" Mary", " John\n"), {}, "ends in a space"),
        ((" Mary", " John"), {"roles": {"giver": ("John ", "Mary")}}, "'John ' ends in a space"),
    ],
)
def test_spaces_at_the_end_are_refused(answers, more, message):
    with pytest.raises(ValueError, match=message):
        prompt_task(tiny.model("gpt2"), *GIVES, answers, **more)


def test_several_answers_on_both_sides_are_one_pair_or_refused(model):
    several = ([" Mary", " Amy"], [" John", " Dan"])
    found = prompt_task(model, *GIVES, several)
    wanted = prompt_task(model, *GIVES, [several])
    assert found.clean_baseline == wanted.clean_baseline
    assert found.metric.name == "log-probability difference"
    with pytest.raises(ValueError, match="may be several right and several wrong ones"):
        prompt_task(model, GIVES[:1] * 2, GIVES[1:] * 2, several)


@pytest.mark.parametrize("metric", ["probability", "logit difference"])
def test_an_answer_within_another_counts_once(model, metric):
    """That it goes on is part of the event that it begins."""
    wanted = prompt_task(model, *GIVES, ([" Mary", " Amy"], [" John"]), metric=metric)
    for right in (
        [" Mary", " Amy", " Mary"],
        [" Mary and", " Mary", " Amy"],
        [" Amy", " Mary", " Mary and John"],
    ):
        found = prompt_task(model, *GIVES, (right, [" John"]), metric=metric)
        assert found.clean_baseline == pytest.approx(wanted.clean_baseline, abs=1e-6)


@pytest.mark.parametrize("kind", [pd.Series, np.array, tuple])
def test_prompts_may_be_a_column_or_an_array(model, kind):
    clean, corrupted = (kind([text]) for text in GIVES)
    found = prompt_task(model, clean, corrupted, (" Mary", " John"))
    assert found.clean_baseline == prompt_task(model, *GIVES, (" Mary", " John")).clean_baseline


@pytest.mark.parametrize("change", ["answers", "an index", "a year"])
def test_numbers_in_a_table_are_no_text(change):
    """They would be token ids and positions."""
    text = "clean,corrupted,right,wrong\nTwo plus five is,Two plus six is, seven, eight\n"
    if change == "answers":
        text = text.replace("seven", "7").replace("eight", "8")
    frame = pd.read_csv(io.StringIO(text))
    if change == "an index":
        frame = pd.read_csv(io.StringIO(frame.to_csv()))
    if change == "a year":
        frame["subject"] = 1999
    with pytest.raises(TypeError, match=r"row 0: column '(right|Unnamed: 0|subject)' holds \d+"):
        Task.from_frame(tiny.model("gpt2"), frame)


def test_rows_of_a_table_may_have_the_same_name():
    frame = pd.DataFrame(
        {"clean": GIVES[0], "corrupted": GIVES[1], "right": [None], "wrong": " John"}
    )
    with pytest.raises(ValueError, match=r"row 0: \['right'\] is empty"):
        Task.from_frame(tiny.model("gpt2"), pd.concat([frame] * 2))
    frame["right"] = "Mary"
    with pytest.raises(ValueError, match=r"row 0: the right answer .* leading space"):
        Task.from_frame(tiny.model("gpt2"), pd.concat([frame] * 2))


def test_a_named_score_does_not_follow_a_function(model):
    """The positions that a function reads are its own."""
    task = ioi_task(model)
    earlier = reads(task.metric.positions - 1)(lambda logits: logits.amax((-2, -1)))
    for metric in (earlier, lambda logits: logits[:, -1, 5] - logits[:, -1, 6]):
        other = task.with_metric(model, metric)
        with pytest.raises(ValueError, match="on the task as it was before"):
            other.with_metric(model, "logit difference")
        with pytest.raises(ValueError, match="does not say which answer"):
            other.solved()


@pytest.mark.parametrize("per_prompt", [True, False])
def test_a_function_of_each_row_is_a_mean_over_a_prompts_rows(model, per_prompt):
    task = prompt_task(model, *GIVES, (" Mary home", " John the"))
    assert task.rows_per_prompt == 2
    task = task.with_metric(model, lambda logits: logits[:, -1].logsumexp(-1))
    found = sweep(model, task, "out", by="all_pos", per_prompt=per_prompt, progress=False)
    found = found.mean("prompt") if per_prompt else found
    clean = task.clean_cache(model)["blocks.0.attn.hook_z"]

    def put(activation, hook):
        activation[:, :, 1] = clean[:, :, 1]
        return activation

    with torch.no_grad():
        logits = model.run_with_hooks(
            task.corrupted_tokens, fwd_hooks=[("blocks.0.attn.hook_z", put)]
        )
    wanted = float(logits[:, -1].logsumexp(-1).mean())
    assert float(found[0, 1]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.filterwarnings("ignore:the model runs in bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["probability", "log-probability", "logit difference"])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_task_of_another_model_is_refused_by_any_metric(metric, dtype, normalised):
    one, other = (tiny.fresh("gpt2", seed=seed).to(dtype) for seed in (0, 1))
    task = ioi_task(one, metric=metric)
    task = task.normalised() if normalised else task
    with pytest.raises(ValueError, match="the task belongs to another model"):
        sweep(other, task, "resid_pre", progress=False)


def test_too_many_prompts_at_once_are_refused_before_they_end_the_process(model, monkeypatch):
    task = ioi_task(model)
    needed = 3 * task.corrupted_tokens.numel() * model.cfg.d_vocab * 4
    monkeypatch.setattr(
        question.psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1)
    )
    with pytest.raises(ValueError, match="logits of 8 prompts of .* go by='role'"):
        sweep(model, task, "resid_pre", progress=False)
