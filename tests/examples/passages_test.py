import gzip

import numpy as np
import pytest

import passages
from passages import Paragraph

WIKI = """ = A lobster =

 The lobster is blue .
 = = Range = =

 It lives in the sea .
 = A song =
 It was sung .
"""


def test_wikitext_by_article(tmp_path):
    with gzip.open(tmp_path / "wiki.gz", "wt") as file:
        file.write(WIKI)
    (tmp_path / "plain.txt").write_text("One line.\n\n= not a title\n")
    assert passages.read([str(tmp_path / "wiki.gz"), str(tmp_path / "plain.txt")]) == [
        Paragraph("The lobster is blue .", "A lobster"),
        Paragraph("It lives in the sea .", "A lobster"),
        Paragraph("It was sung .", "A song"),
        Paragraph("One line.", "plain.txt"),
        Paragraph("= not a title", "plain.txt"),
    ]
    (tmp_path / "plain.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"Expected lines of text in .*plain\.txt"):
        passages.read([str(tmp_path / "plain.txt")])


@pytest.fixture
def tokenizer(tmp_path):
    """Of bytes alone: as many pieces as there are bytes, and the two special ones."""
    return passages.vocabulary([Paragraph("abc", "")], 258, tmp_path / "vocabulary.json")


def test_a_vocabulary_is_learnt_once(tmp_path, tokenizer):
    assert tokenizer.get_vocab_size() == 258
    assert [tokenizer.token_to_id(each) for each in ("<pad>", "<s>")] == [0, 1]
    again = passages.vocabulary([Paragraph("other", "")], 300, tmp_path / "vocabulary.json")
    assert again.get_vocab() == tokenizer.get_vocab()


def test_paragraphs_are_cut_to_one_length(tokenizer):
    paragraphs = [Paragraph("a" * 42, "first"), Paragraph("b" * 15, "second")]
    cut = passages.cut(paragraphs, tokenizer, 24)
    # 24 and 18 of the first; 15 are too few.
    assert cut.sources == ["first", "first"] and cut.num_tokens == 42
    a = tokenizer.token_to_id("a")
    np.testing.assert_array_equal(cut.inputs, [[1, *[a] * 23], [1, *[a] * 17, *[0] * 6]])
    np.testing.assert_array_equal(cut.labels, [[a] * 24, [a] * 18 + [0] * 6])
    np.testing.assert_array_equal(cut.weights, [[1] * 24, [1] * 18 + [0] * 6])
    assert passages.text(cut, 1, tokenizer) == ("", "a" * 18)
    assert passages.text(passages.halves(cut), 1, tokenizer) == ("a" * 9, "a" * 9)
    assert cut.take(np.array([1])).num_tokens == 18
    with pytest.raises(ValueError, match=r"a line of 16 tokens or more\. Received 1 lines"):
        passages.cut(paragraphs[1:], tokenizer, 24)


def test_split(tokenizer):
    whole = passages.cut([Paragraph("a" * 24, str(i)) for i in range(40)], tokenizer, 24)
    train, test = passages.split(whole, 0, seed=1)
    # A twentieth of 40 passages.
    assert len(test.sources) == 2
    assert sorted(train.sources + test.sources, key=int) == whole.sources
    assert train.sources == sorted(train.sources, key=int)
    assert passages.split(whole, 5, seed=1)[0].sources == train.sources[:5]
    with pytest.raises(ValueError, match=r"two are needed\. Received: 1"):
        passages.split(whole.take(np.array([0])), 0, seed=1)


def test_questions(tokenizer):
    asked = passages.questions(["ab => cd"], tokenizer, 8)
    ids = [tokenizer.token_to_id(each) for each in ("a", "b", "Ġ", "c", "d")]
    np.testing.assert_array_equal(asked.inputs, [[1, *ids[:4], 0, 0, 0]])
    np.testing.assert_array_equal(asked.labels, [[*ids, 0, 0, 0]])
    np.testing.assert_array_equal(asked.weights, [[0, 0, 1, 1, 1, 0, 0, 0]])
    assert passages.text(asked, 0, tokenizer) == ("ab", " cd")
    for text in ("ab", " => cd", "ab => "):
        with pytest.raises(ValueError, match="a prompt, ' => ' and a continuation"):
            passages.questions([text], tokenizer, 8)
    with pytest.raises(ValueError, match=r"may have 8 tokens.* Received 9"):
        passages.questions(["abcdef => gh"], tokenizer, 8)
