"Which of a prompt's answers become a pair: the filters at their edges, and whose turn it is among equals"
import random

import pytest

from wikidpo.core.pairs import make_pairs, temperature_table


def samples(*scores, prompt_id=0, **more):
    "Scored answers to one prompt, in the order of k"
    def row(k, score):
        return {"prompt_id": prompt_id, "k": k, "prompt": f"question {prompt_id}", "text": f"answer {k}",
                "temperature": k / 10, "ids": [k], "finished": k != 2, "score": score}
    return [row(k, score) | more for k, score in enumerate(scores)]


def places(*scores, prompt_id=0):
    "k of chosen and rejected of the only pair"
    (pair,), _ = make_pairs(samples(*scores, prompt_id=prompt_id))
    return int(pair["chosen"][-1]), int(pair["rejected"][-1])


@pytest.mark.parametrize("scores, became", [
    ((8, 6), "pairs"), ((8, 7), "tie"), ((6, 4), "pairs"), ((5, 1), "bad"), ((7, 7), "tie"), ((9, None), "unscored"),
    ((None, None), "unscored"), ((9, 2, None), "pairs"), ((7.5, 5.5), "pairs")])
def test_the_edges_of_the_filters(scores, became):
    pairs, counts = make_pairs(samples(*scores))
    assert counts == {"prompts": 1, "pairs": 0, "tie": 0, "bad": 0, "unscored": 0} | {became: 1}
    assert len(pairs) == counts["pairs"]


def test_the_filters_are_set_by_the_caller():
    assert make_pairs(samples(4, 1), gap=3, best=4)[1]["pairs"] == 1
    assert make_pairs(samples(4, 1), gap=4, best=4)[1]["tie"] == 1
    assert make_pairs(samples(4, 1), gap=3, best=5)[1]["bad"] == 1


def test_a_pair_says_of_each_side_what_its_sample_said():
    (pair,), _ = make_pairs(samples(5, 9, 1, 6))
    assert pair == {
        "prompt": "question 0", "chosen": "answer 1", "rejected": "answer 2", "score_chosen": 9, "score_rejected": 1,
        "temp_chosen": .1, "temp_rejected": .2, "chosen_tokens": [1], "rejected_tokens": [2], "chosen_finished": True,
        "rejected_finished": False}


def test_among_equal_scores_the_prompts_take_turns():
    "Otherwise the first temperature would be chosen wherever the best scores are equal"
    assert [places(9, 9, 9, 1, prompt_id=i)[0] for i in range(8)] == [0, 1, 2, 0, 0, 1, 2, 0]
    assert [places(1, 1, 1, 9, prompt_id=i)[1] for i in range(8)] == [0, 1, 2, 0, 0, 1, 2, 0]


def test_the_turn_goes_round_the_scored_answers_alone():
    assert [places(9, None, 9, 1, prompt_id=i)[0] for i in range(6)] == [0, 2, 0, 0, 2, 0]


def test_the_order_in_the_file_means_nothing():
    rows = [row for i in range(5) for row in samples(9, 9, 1, 1, prompt_id=i)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert make_pairs(shuffled) == make_pairs(rows)
    assert [pair["prompt"] for pair in make_pairs(shuffled)[0]] == [f"question {i}" for i in range(5)]


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_an_answer_without_text_is_none(blank):
    rows = samples(9, 1, 5)
    rows[1] |= {"text": blank}
    assert make_pairs(rows)[0][0]["rejected"] == "answer 2"
    rows[0] |= {"text": blank}
    assert make_pairs(rows)[1]["unscored"] == 1


def test_two_scores_for_one_text_are_no_preference():
    assert make_pairs(samples(9, 1, text="the same"))[1]["tie"] == 1


def test_pairs_are_counted_by_temperature():
    pairs, _ = make_pairs([*samples(9, 1), *samples(9, 1, prompt_id=2), *samples(1, 9, prompt_id=4)])
    assert temperature_table(pairs) == {(0., .1): 2, (.1, 0.): 1}
