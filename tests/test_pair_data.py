"Rows of a dataset: which tokens count, what is refused and where, and batches of a thousand"
import json

import pytest
from tokenizers import Tokenizer

from engines import TOK
from wikidpo.core.chat import encode_prompt, encode_response, end_id, load_tokenizer
from wikidpo.core.data import PairDataset, collate, pad_right
from wikidpo.core.files import UserError
from wikidpo.world.facts import DATA

ROW = {"prompt": "What is the capital of Peru?", "chosen": "Lima.", "rejected": "Rome, I think."}
END = end_id(TOK)
ROOM = len(encode_prompt(TOK, ROW["prompt"]))


def dataset(tmp_path, *rows, block_size=256, tok=TOK):
    path = tmp_path/"pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PairDataset(path, tok, block_size)


def refused(tmp_path, says, *rows, **kw):
    with pytest.raises(UserError, match=says): dataset(tmp_path, *rows, **kw)


def test_sampled_tokens_are_taken_as_they_were_sampled(tmp_path):
    letters = [TOK.token_to_id(c) for c in "Lima."]
    assert letters != TOK.encode("Lima.", add_special_tokens=False).ids
    sampled = ROW | {"chosen_tokens": letters}
    assert dataset(tmp_path, sampled).rows[0][1] == [*letters, END]
    assert dataset(tmp_path, sampled | {"chosen_finished": False}).rows[0][1] == letters
    stale = dataset(tmp_path, sampled | {"chosen": "Lima!"})
    assert stale.rows[0] == (encode_prompt(TOK, ROW["prompt"]), encode_response(TOK, "Lima!"),
                             encode_response(TOK, ROW["rejected"]))
    assert dataset(tmp_path, ROW | {"rejected_finished": False}).rows[0][2][-1] != END


def test_the_response_counts_and_the_prompt_does_not(tmp_path):
    data = dataset(tmp_path, ROW)
    prompt, chosen, rejected = data.rows[0]
    assert data[0] == ((prompt + chosen, [0] * len(prompt) + [1] * len(chosen)),
                       (prompt + rejected, [0] * len(prompt) + [1] * len(rejected)))
    cut = dataset(tmp_path, ROW, block_size=ROOM + 2)[0]
    assert cut == tuple((prompt + side[:2], [0] * ROOM + [1, 1]) for side in (chosen, rejected))


def test_a_prompt_needs_room_for_one_token_more(tmp_path):
    assert sum(dataset(tmp_path, ROW, block_size=ROOM + 1)[0][0][1]) == 1
    refused(tmp_path, rf"pairs.jsonl:1: the prompt has {ROOM} tokens and leaves no room", ROW, block_size=ROOM)


def test_a_row_that_cannot_be_used_is_named_also_behind_a_thousand_others(tmp_path):
    rows = [ROW] * 1200
    assert len(dataset(tmp_path, *rows)) == 1200
    refused(tmp_path, "pairs.jsonl:1101: the prompt has", *rows[:1100], ROW | {"prompt": "word " * 300})
    same = ROW | {"chosen": "x", "rejected": "x"}
    refused(tmp_path, "pairs.jsonl:1101: chosen and rejected are the same", *rows[:1100], same)
    refused(tmp_path, "pairs.jsonl:2: the field 'chosen' is empty", ROW, ROW | {"chosen": " "})


@pytest.mark.parametrize("change, says", [
    ({"chosen": "<|end|>", "chosen_finished": False}, "a response has no tokens"),
    ({"chosen": "Lima<|end|>", "rejected": "Lima"}, "the same tokens"),
    ({"chosen": "<|pad|>", "rejected": "<|end|>"}, "the same tokens")])
def test_what_only_the_tokens_show_is_refused_in_a_file_and_in_a_list(tmp_path, change, says):
    refused(tmp_path, f"pairs.jsonl:2: .*{says}", ROW, ROW | change)
    with pytest.raises(UserError, match=f"pairs:2: .*{says}"): PairDataset([ROW, ROW | change], TOK, 256)


@pytest.mark.parametrize("row, says", [
    ({"prompt": "Who?", "chosen": "I"}, "the field 'rejected' is missing"), (ROW | {"chosen": 3}, "expected a text"),
    (ROW | {"rejected": "Lima."}, "the same text"), ("a text", "expected an object")])
def test_objects_of_a_list_are_held_to_the_same_as_lines(row, says):
    with pytest.raises(UserError, match=f"pairs:2: .*{says}"): PairDataset([ROW, row], TOK, 256)


def test_an_end_among_the_sampled_ids_is_not_doubled_and_ids_of_another_tokenizer_are_none(tmp_path):
    letters = [TOK.token_to_id(c) for c in "Lima."]
    for finished, ids in ((True, [*letters, END]), (False, letters)):
        row = ROW | {"chosen_tokens": [*letters, END], "chosen_finished": finished}
        assert dataset(tmp_path, row).rows[0][1] == ids
    foreign = dataset(tmp_path, ROW | {"chosen_tokens": [*letters, 1_000_000]})
    assert foreign.rows[0][1] == encode_response(TOK, "Lima.")
    refused(tmp_path, "holds no pairs")


def test_what_is_held_out_is_the_end_of_the_file(tmp_path):
    rows = [ROW | {"chosen": f"Lima {i}"} for i in range(5)]
    data = dataset(tmp_path, *rows)
    whole = data.digest
    train, held_out = data.split(2)
    assert train.rows == data.rows[:3] and held_out.rows == data.rows[3:]
    assert [p["chosen"] for p in held_out.pairs] == ["Lima 3", "Lima 4"]
    assert len({whole, train.digest, held_out.digest}) == 3


def test_the_digest_knows_order_context_and_tokenizer(tmp_path):
    other = ROW | {"chosen": "Lima"}
    found = [dataset(tmp_path, ROW, other).digest, dataset(tmp_path, other, ROW).digest,
             dataset(tmp_path, ROW, other, block_size=200).digest]
    tok = load_tokenizer(DATA/"tokenizer.json")
    tok.add_tokens(["<new>"])
    found.append(dataset(tmp_path, ROW, other, tok=tok).digest)
    assert len(set(found)) == 4 and dataset(tmp_path, ROW, other).digest == found[0]


def test_a_tokenizer_that_is_set_to_pad_and_to_cut_does_neither(tmp_path):
    "Prompts are encoded many at once: the short one would be padded to the long one"
    tok = Tokenizer.from_file(str(DATA/"tokenizer.json"))
    tok.enable_padding(length=200)
    tok.enable_truncation(5)
    tok.save(str(tmp_path/"tokenizer.json"))
    rows = ROW, ROW | {"prompt": "Who?"}
    loaded = load_tokenizer(tmp_path/"tokenizer.json")
    assert dataset(tmp_path, *rows, tok=loaded).rows == dataset(tmp_path, *rows).rows


def test_a_batch_is_padded_on_the_right_and_remembers_its_pairs(tmp_path):
    data = dataset(tmp_path, ROW, ROW | {"chosen": "The capital of Peru is Lima, on the coast.", "rejected": "No."})
    batch = collate([data[0], data[1]], [7, 3])
    assert batch.pair_ids == [7, 3] and batch.weight == 1 and len(batch) == 2
    longest = max(len(ids) for pair in (data[0], data[1]) for ids, _ in pair)
    for i, sides in enumerate(zip((batch.chosen_ids, batch.rejected_ids), (batch.chosen_mask, batch.rejected_mask))):
        for k in (0, 1):
            ids, mask = data[k][i]
            pad = [0] * (longest - len(ids))
            assert sides[0][k].tolist() == ids + pad and sides[1][k].tolist() == mask + pad
    ids, mask = batch.rows()
    assert ids[1].tolist() == batch.chosen_ids[1].tolist() and ids[2].tolist() == batch.rejected_ids[0].tolist()
    assert mask.sum(1).tolist() == [len(data.rows[k][side]) for side in (1, 2) for k in (0, 1)]


def test_padding_is_told_apart_by_length_alone():
    x, lengths = pad_right([[0, 5, 0], [0]])
    assert x.tolist() == [[0, 5, 0], [0, 0, 0]] and lengths.tolist() == [3, 1]
