"""Requests of clients: what is read of them, and a message that names the field for what cannot be done."""

import math

import pytest

from cooper_jax.serving.api_errors import ApiError
from cooper_jax.serving.chat_requests import parse_chat_request
from cooper_jax.serving.score_service import parse_rerank_request, parse_score_request
from cooper_jax.types import Triple

MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


def parse(**fields):
    return parse_chat_request({"model": "policy", "messages": MESSAGES} | fields, 64, 8)


def test_absent_and_null_fields_have_defaults():
    request = parse(
        n=None, stop=None, temperature=None, seed=None, stream_options=None, tools=None, user="me"
    )
    assert request == parse()
    assert request.messages == [("user", "What is 2 + 3?")]
    assert (request.n, request.limit, request.seed, request.stops) == (1, 64, None, ())
    assert request.settings.inverse_temperature == 1 and request.settings.min_p_depth == math.inf


def test_fields_are_read():
    content = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts \ud83d"}]
    messages = [{"role": "developer", "content": "Help."}, {"role": "user", "name": "x", "content": content}]
    request = parse(
        messages=messages, n=3, max_completion_tokens=7, temperature=0.5, top_k=-1, seed=-1, stop="#", stream=True,
        stream_options={"include_usage": True}, chat_template_kwargs={"enable_thinking": False},
        response_format={"type": "text"}, frequency_penalty=0.0,
    )  # fmt: skip
    assert request.messages == [("system", "Help."), ("user", "two parts \ufffd")]
    assert (request.n, request.limit, request.seed, request.stops) == (3, 7, 2**32 - 1, ("#",))
    assert request.settings.inverse_temperature == 2 and request.settings.top_k == 0
    assert request.stream and request.include_usage
    assert request.template_variables == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "Hello"}, "messages", "give a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool' is none of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "give a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "tool_calls", "no such field"),
        ({"temperature": "hot"}, "temperature", "expected a number, got 'hot'"),
        ({"temperature": True}, "temperature", "expected a number"),
        ({"temperature": 2.5}, "temperature", "2.5 is not from 0 to 2"),
        ({"temperature": math.nan}, "temperature", "nan is not from 0 to 2"),
        ({"top_p": 0}, "top_p", "keeps no token"),
        ({"n": 0}, "n", "0 is not from 1 to 8"),
        ({"n": 1.5}, "n", "expected an integer"),
        ({"max_tokens": 65}, "max_tokens", "above this server's limit of 64 tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "leave one of them out"),
        ({"seed": 2**63}, "seed", "is not from"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"stop": ["a"] * 17}, "stop", "17 texts"),
        ({"stream": "yes"}, "stream", "expected true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "belongs to stream=true"),
        ({"logprobs": True, "top_logprobs": 5}, "top_logprobs", "does not support it"),
        ({"tools": [{"type": "function"}]}, "tools", "does not support it"),
        ({"presence_penalty": 0.5}, "presence_penalty", "does not support it"),
        ({"response_format": {"type": "json_object"}}, "response_format", "does not support it"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template", "no such field"),
        ({"best_of": 3}, "best_of", "no such field"),
    ],
)
def test_what_cannot_be_done_names_the_field(fields, field, words):
    with pytest.raises(ApiError) as error:
        parse(**fields)
    body = error.value.make_body()["error"]
    assert error.value.status == 400 and body["type"] == "invalid_request_error"
    assert body["param"] == field and words in body["message"]


def test_one_question_and_reference_serve_all_completions():
    body = {"questions": "What?", "references": ["1", "2"], "completions": ["a", "b"]}
    assert parse_score_request(body, 2) == [Triple("What?", "1", "a"), Triple("What?", "2", "b")]
    rerank = parse_rerank_request(
        {"query": "What?", "reference": "", "documents": ["a", {"text": "b"}], "top_n": 5}, 2
    )
    assert rerank.triples == [Triple("What?", "", "a"), Triple("What?", "", "b")] and rerank.top_n == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"completions": []}, "completions"),
        ({"completions": ["a"] * 3}, "completions"),
        ({"completions": ["a", None]}, "completions"),
        ({"questions": ["What?"]}, "questions"),
        ({"references": None}, "references"),
        ({"text_1": "a"}, "text_1"),
    ],
)
def test_scores_that_cannot_be_computed_name_the_field(changes, field):
    body = {"questions": "What?", "references": "1", "completions": ["a", "b"]} | changes
    with pytest.raises(ApiError) as error:
        parse_score_request(body, 2)
    assert error.value.param == field


def test_a_ranking_needs_a_reference():
    with pytest.raises(ApiError, match="compares with a reference answer"):
        parse_rerank_request({"query": "What?", "documents": ["a"]}, 2)
