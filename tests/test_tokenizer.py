"""A tokenizer learned of texts: what it makes of them, and what it is stored as."""

import json
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxdiff import data, nn
from jaxdiff.data import scenes

TEXTS = [f"a {size} {colour} circle" for size in ("big", "small") for colour in ("red", "green")]
UNSEEN = [
    "Zürich, naïve: 100% \n\t of <pad> it",
    " two  spaces ",
    "日本語 \U0001f600",
    "\x00",
    "",
    " ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return data.learn_tokenizer(TEXTS, length=40)


def test_words_that_occur_become_tokens(tokenizer):
    found = tokenizer(["a big red circle", "A BIG Red Circle", "circle"])
    assert found["tokens"].dtype == np.int32
    assert found["mask"].dtype == bool
    assert found["tokens"].shape == found["mask"].shape == (3, 40)
    np.testing.assert_array_equal(found["mask"].sum(axis=1), [4, 4, 1])
    np.testing.assert_array_equal(found["tokens"][0], found["tokens"][1])
    assert found["tokens"][2, 0] == found["tokens"][0, 3]  # the same where it comes first
    np.testing.assert_array_equal(found["tokens"] > 0, found["mask"])
    assert found["tokens"].max() < tokenizer.num_tokens


def test_any_text_returns(tokenizer):
    assert tokenizer.decode(tokenizer(TEXTS)["tokens"]) == TEXTS
    for text in UNSEEN:
        assert tokenizer.decode(tokenizer([text])["tokens"]) == [text.lower()]
    assert tokenizer.decode(tokenizer("ＡＢ ﬁ")["tokens"]) == ["ab fi"]  # NFKC
    every = "".join(chr(code) for code in (*range(0x20, 0x7F), 0xE9, 0x4E2D))
    long = data.learn_tokenizer([every])
    assert long.decode(long(every)["tokens"]) == [every.lower()]


def test_nothing_said_is_no_token(tokenizer):
    np.testing.assert_array_equal(tokenizer(["", " "])["mask"].any(axis=1), [False, True])


def test_it_is_as_long_as_the_longest_text_unless_told():
    learned = data.learn_tokenizer(TEXTS + ["xyz"])
    assert learned.length == learned(TEXTS)["mask"].sum(axis=1).max()
    assert learned(TEXTS)["mask"].shape == (4, learned.length)
    assert data.learn_tokenizer([""]).length == 1


def test_the_vocabulary_is_at_most_what_is_asked():
    texts = scenes.Scenes(300).captions(np.arange(300))
    for asked in (257, 300, 512):
        learned = data.learn_tokenizer(texts, num_tokens=asked)
        assert learned.num_tokens <= asked
        assert learned(texts)["tokens"].max() < learned.num_tokens
    assert data.learn_tokenizer(texts, num_tokens=257).num_tokens == 257
    assert data.learn_tokenizer(texts, num_tokens=300).num_tokens == 300


def test_pairs_that_make_the_same_token_make_one():
    from jaxdiff.data.tokenizer import Tokenizer

    pairs = (("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"))
    made = Tokenizer(pairs, 8)
    assert made.num_tokens == 1 + 256 + 3
    assert made(["abc"])["tokens"].max() < made.num_tokens


def test_tokenizers_stay_what_they_were(tokenizer):
    """Also in another process: what is counted in a hash table has no order of its own."""
    merges = [pair.replace("\u0120", "_") for pair in tokenizer.to_record()["merges"]]
    assert merges[:6] == ["c i", "c l", "r e", "r cl", "_ a", "_ ci"]
    numbers = tokenizer(["a Red circle é"])["tokens"][0, :7]
    np.testing.assert_array_equal(numbers, [261, 275, 264, 221, 128, 103, 0])


@pytest.mark.slow
def test_the_same_texts_give_the_same_tokenizer_in_every_process():
    code = """if True:
        import json
        import numpy as np
        from jaxdiff import data
        from jaxdiff.data import scenes
        texts = scenes.Scenes(300).captions(np.arange(300))
        print(json.dumps(data.learn_tokenizer(texts).to_record()))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    texts = scenes.Scenes(300).captions(np.arange(300))
    assert json.loads(run.stdout) == data.learn_tokenizer(iter(texts)).to_record()


def test_it_is_its_record(tokenizer):
    record = json.loads(json.dumps(tokenizer.to_record()))
    other = data.Tokenizer.from_record(record)
    assert other == tokenizer
    assert hash(other) == hash(tokenizer)
    assert other != data.learn_tokenizer(TEXTS, length=41)
    assert other != data.learn_tokenizer(TEXTS[:2], length=40)
    assert (other.num_tokens, other.length) == (tokenizer.num_tokens, tokenizer.length)
    np.testing.assert_array_equal(
        other(TEXTS + UNSEEN)["tokens"], tokenizer(TEXTS + UNSEEN)["tokens"]
    )
    learned = data.learn_tokenizer(scenes.Scenes(300).captions(np.arange(300)))
    assert len(json.dumps(learned.to_record())) < 8_000


def test_it_goes_through_pickle_and_threads(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other == tokenizer
    wanted = tokenizer(TEXTS)["tokens"]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(other, [TEXTS] * 20):
            np.testing.assert_array_equal(found["tokens"], wanted)


def test_a_batch_of_captions_takes_milliseconds():
    texts = scenes.Scenes(64).captions(np.arange(64))
    learned = data.learn_tokenizer(texts)
    times = []
    for _ in range(10):
        before = time.thread_time()
        learned(texts)
        times.append(time.thread_time() - before)
    assert min(times) < 5e-3


def test_records_of_scenes_are_read_with_it():
    records = scenes.Scenes(20)
    learned = data.learn_tokenizer(records.captions(np.arange(20)))
    read = data.tokenized(records, learned).rows(np.arange(3))
    assert read["text"]["tokens"].shape == (3, learned.length)
    texts = nn.Texts(learned.num_tokens, length=learned.length)
    assert {name: value.dtype for name, value in read["text"].items()} == {
        name: value.dtype for name, value in texts.null().items()
    }


def test_a_text_that_is_too_long_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="at most 40 tokens each; 'zzz.*' has 51"):
        tokenizer(["a", "z" * 50])
    with pytest.raises(ValueError, match="at most 2 tokens each; 'a big red circle' has 4"):
        data.learn_tokenizer(TEXTS, length=2)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ([], {}, ValueError, "`texts` must hold at least one text; got none"),
        (["a", 3], {}, TypeError, "`texts` must be texts; got 3"),
        (3, {}, TypeError, "`texts` must be texts; got 3"),
        (["\ud800"], {}, ValueError, r"`texts` must be Unicode; got '\\ud800'"),
        (["a"], {"num_tokens": 256}, ValueError, "`num_tokens` must be at least 257"),
        (["a"], {"length": 0}, ValueError, "`length` must be at least 1"),
    ],
)
def test_what_cannot_be_learned_of_is_refused(texts, options, error, message):
    with pytest.raises(error, match=message):
        data.learn_tokenizer(texts, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "`record` must be what Tokenizer.to_record"),
        ({"more": 1}, "`record` must be what Tokenizer.to_record"),
        ({"merges": ["a"]}, "pairs of tokens with a space between"),
        ({"merges": 3}, "pairs of tokens with a space between"),
        ({"merges": ["abc d"]}, "do not follow from each other"),
        ({"length": 0}, "`length` must be at least 1"),
    ],
)
def test_what_is_no_record_is_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        data.Tokenizer.from_record({**tokenizer.to_record(), **change})


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (np.zeros(3, int), ValueError, r"`tokens` must have shape \(B, L\); got \(3,\)"),
        (np.full((1, 3), 999), ValueError, "`tokens` must be in 0.."),
        (np.zeros((1, 3)), TypeError, "`tokens` must hold integers"),
    ],
)
def test_what_are_no_tokens_is_refused(tokenizer, tokens, error, message):
    with pytest.raises(error, match=message):
        tokenizer.decode(tokens)


def test_the_missing_library_is_said_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ImportError, match=r"learn_tokenizer needs tokenizers.*jaxdiff\[pretrained\]"
    ):
        data.learn_tokenizer(TEXTS)
