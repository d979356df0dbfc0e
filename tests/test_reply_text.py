"""The text of a reply that grows: nothing is sent that later changes, and stop texts end it wherever they begin."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cooper_jax.serving.reply_text import ReplyText


def decode(tokens):
    """Tokens are bytes: characters of several bytes are several tokens."""
    return bytes(tokens).decode(errors="replace")


def read(text: str, sizes, stops=(), eos=False):
    """The pieces of a text that arrives in pieces of these sizes, and the reply."""
    reply = ReplyText(decode, stops)
    tokens, pieces = list(text.encode()), []
    if eos:
        tokens.append(0)
    while tokens and not reply.stopped:
        size = sizes.pop(0) if sizes else len(tokens)
        arrived, tokens = tokens[:size], tokens[size:]
        pieces.append(reply.add(arrived, is_last=not tokens, ends_with_eos=eos and not tokens))
    return pieces, reply


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.integers(1, 5), max_size=30), st.booleans())
def test_the_pieces_are_the_text(text, sizes, eos):
    text = text.encode(errors="replace").decode()
    pieces, reply = read(text, sizes, eos=eos)
    assert "".join(pieces) == reply.text == text
    assert reply.num_tokens == len(text.encode()) + eos


@settings(deadline=None)
@given(
    st.text("ab1é", max_size=30),
    st.lists(st.integers(1, 4), max_size=30),
    st.sampled_from(["ab", "é", "aab", "b1b"]),
)
def test_a_stop_text_ends_the_reply_before_itself(text, sizes, stop):
    pieces, reply = read(text, sizes, stops=("zz", stop))
    assert "".join(pieces) == reply.text == text.partition(stop)[0]
    assert reply.stopped == (stop in text)
    if reply.stopped:  # tokens up to the stop text's end
        assert reply.num_tokens == len((reply.text + stop).encode())


def test_the_first_of_several_stop_texts_counts():
    pieces, reply = read("one, two. three", [3, 3, 3], stops=(".", ","))
    assert reply.text == "one" and pieces[0] == "one"


def test_a_whole_reply_is_decoded_once():
    calls = []

    def count(tokens):
        calls.append(len(tokens))
        return decode(tokens)

    reply = ReplyText(count, in_pieces=False)
    pieces = [reply.add([97, 98], is_last=False), reply.add([99, 0], is_last=True, ends_with_eos=True)]
    assert pieces == ["", "abc"] and reply.text == "abc" and reply.num_tokens == 4 and calls == [3]


@pytest.mark.parametrize("text", ["half a stop: STO", "�"])
def test_what_was_kept_back_is_sent_at_the_end(text):
    pieces, reply = read(text, [1] * 5, stops=("STOP",))
    assert "".join(pieces) == text and not reply.stopped
