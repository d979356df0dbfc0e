"""Language models that are asked, and the judge: what a reply says, and what it leaves undecided."""

import json
import threading
import time

import jax
import pytest
import tiny_models
import tiny_tokenizers
from chat_server import Server, reply

from cooper_jax.configs import base
from cooper_jax.data import prompts
from cooper_jax.llm import chat as chats
from cooper_jax.llm import chat_replies, local_chat
from cooper_jax.llm import judge as judges
from cooper_jax.llm.chat import Failure
from cooper_jax.llm.judge import Judgement
from cooper_jax.model import weight_export
from cooper_jax.runtime import device_layouts
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Completion, Triple

TRIPLE = Triple("How many?", "20", "14 + 6 = 20. The answer is 20.")
IDS = (7, 0, 0, 0)


def section(name="judge", **fields):
    cfg = base.get_config()[name]
    cfg.update(fields)
    return chats.ChatConfig.from_config(cfg, name)


@pytest.fixture
def ask(monkeypatch):
    """(script, fields) -> (client, server), closed afterwards."""
    monkeypatch.setattr(chats, "BACK_OFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = []

    def make(script, name="judge", **fields):
        server = Server(script)
        client = chats.make_chat(section(name, url=server.url, model="m", timeout=5.0, **fields))
        made.extend((server, client))
        return client, server

    yield make
    for thing in reversed(made):
        thing.close()


# --- what a reply says ---------------------------------------------------------------------------------------

REPLIES = [
    (Completion("Verdict: CORRECT"), True, ""),
    (Completion("20 is 20.\n**Verdict: INCORRECT**"), False, ""),
    (Completion("<think>\nVerdict: INCORRECT\n</think>\nVerdict: CORRECT"), True, ""),
    (Completion("Verdict: CORRECT\n</think>\nVerdict: INCORRECT"), False, ""),  # the template had opened it
    (Completion("<think>Verdict: CORRECT"), None, "unparsed"),
    (Completion("Verdict: CORRECT\nVerdict: INCORRECT"), None, "unparsed"),
    (Completion("Verdict: CORRECT or Verdict: INCORRECT"), None, "unparsed"),
    (Completion("It is correct that the answer is 20."), None, "unparsed"),
    (Completion("Verdict: CORRECTLY"), None, "unparsed"),
    (Completion(""), None, "unparsed"),
    (Completion("Verdict: CORRECT", truncated=True), None, "truncated"),
    (Failure("http_500"), None, "http_500"),
]


@pytest.mark.parametrize(("reply", "correct", "reason"), REPLIES)
def test_a_reply_is_read_strictly(reply, correct, reason):
    found = judges.parse_judgement_reply(reply)
    assert (found.correct, found.reason) == (correct, reason)
    assert found.reply == ("" if isinstance(reply, Failure) else reply.text)


def test_judge_asks_once_a_triple_and_keeps_order(ask):
    def script(n, body):
        return reply("Verdict: CORRECT" if "<reference_answer>20<" in body["messages"][0]["content"] else "?")

    client, server = ask(script)
    other = Triple("How many?", "21", TRIPLE.completion)
    found = judges.judge_triples(client, [other, TRIPLE, other], [IDS, (7, 0, 1, 0), (7, 0, 2, 0)])
    assert found == [
        Judgement(None, "?", "unparsed"),
        Judgement(True, "Verdict: CORRECT"),
        Judgement(None, "?", "unparsed"),
    ]
    assert len(server.requests) == 3
    sent = server.bodies[0]
    assert sent["temperature"] == 0.0 and "chat_template_kwargs" not in sent
    wanted = [prompts.make_judge_messages(t.question, t.reference, t.completion) for t in (other, TRIPLE)]
    assert {b["messages"][0]["content"] for b in server.bodies} == {m[0][1] for m in wanted}


def test_a_server_that_fails_decides_nothing(ask):
    client, _ = ask(lambda n, body: (400, {}, b"{}"))
    assert judges.judge_triples(client, [TRIPLE], [IDS]) == [Judgement(None, "", "http_400")]


# --- models that are asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "told"), [("off", False), ("on", True)])
def test_thinking_is_switched_where_the_section_says_so(ask, choice, told):
    client, server = ask(lambda n, body: reply("ok"), thinking=choice)
    client.ask([[("user", "hello")]], [IDS])
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": told}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(thinking="maybe", url="http://h/v1", model="m"),
            "judge.thinking='maybe': it is one of '', on, off",
        ),
        (dict(kind="corrupt"), "judge.kind='corrupt': it must be one of openai, local"),
        (dict(kind="local"), "judge.kind=local: this program has no rollout engine"),
        (dict(url="http://h/v1"), "set --config.judge.model"),
    ],
)
def test_make_names_the_section(fields, message):
    with pytest.raises(ValueError) as caught:
        chats.make_chat(section(**fields))
    assert message in str(caught.value)


def test_each_section_draws_its_own_seeds(ask):
    seeds = []
    for name in ("assistant", "judge", "source", "source"):
        client, server = ask(lambda n, body: reply("ok"), name=name, kind="openai")
        client.ask([[("user", "hello")]], [IDS])
        seeds.append(server.bodies[0]["seed"])
    assert len(set(seeds)) == 3 and seeds[2] == seeds[3]


def test_stream_gives_replies_as_they_come(ask):
    held = threading.Event()

    def script(n, body):
        text = body["messages"][0]["content"]
        if text == "0":
            held.wait(10)
        return reply(text)

    client, _ = ask(script, concurrency=2)
    found = []
    for place, got in client.stream(([("user", str(i))], (7, 0, i, 0)) for i in range(5)):
        found.append((place, got.text))
        if len(found) == 4:
            held.set()
    assert found[-1] == (0, "0") and sorted(found) == [(i, str(i)) for i in range(5)]


def test_half_a_surrogate_pair_is_replaced_both_ways(ask):
    """A tokenizer, the rule's cache and a ledger raise on what has no UTF-8 form."""
    client, server = ask(lambda n, body: reply("Verdict: CORRECT \ud83d"))
    talk = [("user", "is it 4?\ude00")]
    ((_, streamed),) = client.stream([(talk, IDS)])
    (asked,) = client.ask([talk], [IDS])
    assert streamed.text == asked.text == "Verdict: CORRECT \ufffd"
    assert [body["messages"][0]["content"] for body in server.bodies] == ["is it 4?\ufffd"] * 2


def test_stream_answers_what_it_has_taken_when_the_requests_end(ask):
    """A caller that is to stop ends its requests; nothing that was sent is thrown away."""
    stop, taken = threading.Event(), []

    def requests():
        for i in range(1000):
            if stop.is_set():
                return
            taken.append(i)
            yield [("user", str(i))], (7, 0, i, 0)

    def script(n, body):
        time.sleep(0.01)
        return reply("x")

    client, _ = ask(script, concurrency=2)
    found = []
    for place, _ in client.stream(requests()):
        found.append(place)
        if len(found) == 3:
            stop.set()
    assert sorted(found) == taken and 3 < len(taken) < 20


# --- weights of our own --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model of one layer with a chat template's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizers.write(folder / "llama", "llama3")
    model = tiny_models.config(vocab_size=512, width=16, layers=1, head_dim=8)
    weight_export.save_pretrained(
        folder / "hf", model, tiny_models.random_params(model), "logits", tokenizer_dir=tokenizer
    )
    return folder / "hf"


def local(directory, tmp_path, name, **fields):
    cfg = base.get_config()
    cfg[name].update(kind="local", weights=str(directory), max_new_tokens=6, **fields)
    layout = device_layouts.make_layouts(cfg, jax.devices()[:1])["policy"]
    return local_chat.open_chat(cfg, name, layout, tmp_path)


@pytest.mark.slow
def test_local_is_greedy_at_temperature_0_and_drawn_by_name_above(directory, tmp_path):
    asked = [[("user", "2 + 2")], [("user", "The answer is 7.")]]
    greedy = local(directory, tmp_path, "judge")
    first, again = (greedy.ask(asked, [(seed, 0, 3, 0), (seed, 0, 4, 0)]) for seed in (0, 1))
    assert first == again and not greedy.overlaps
    judge, source = (local(directory, tmp_path, n, temperature=1.0) for n in ("judge", "source"))
    ids = [(0, 0, 3, 0), (0, 1, 4, 0)]  # of two steps: sampled apart
    drawn = judge.ask(asked, ids)
    assert judge.ask(asked[1:], ids[1:]) == drawn[1:] and drawn == judge.ask(asked, ids)
    assert source.ask(asked, ids) != drawn != first


def test_local_refuses_what_does_not_fit(directory, tmp_path):
    """The model was trained for 256 tokens; its neighbours are answered."""
    chat = local(directory, tmp_path, "judge")
    long, short = [("user", "9" * 300)], [("user", "9")]
    replies = chat.ask([short, long, short], [(0, 0, i, 0) for i in range(3)])
    assert replies[1] == Failure("too_long") and replies[0] == replies[2] and replies[0].tokens
    assert chat.ask([long], [IDS]) == [Failure("too_long")] and chat.ask([], []) == []
    small = local(directory, tmp_path, "judge", max_prompt_tokens=8)
    assert small.ask([[("user", "9 9 9 9 9 9 9 9")]], [IDS]) == [Failure("too_long")]


def test_local_needs_trained_weights(tmp_path):
    cfg = base.get_config()
    cfg.judge.kind = "local"
    with pytest.raises(SetupError, match="--config.judge.weights=DIR"):
        local_chat.open_chat(cfg, "judge", device_layouts.make_policy_layout(cfg), tmp_path)


def test_a_judgement_can_be_kept_as_json():
    assert json.loads(json.dumps(judges.parse_judgement_reply(Completion("Verdict: CORRECT")).__dict__)) == {
        "correct": True,
        "reply": "Verdict: CORRECT",
        "reason": "",
    }


# --- servers that differ from the API's description ------------------------------------------------------------

REFUSAL = {
    "error": {
        "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.",
        "type": "invalid_request_error",
    }
}


def strict_server(n, body):
    """A server of a reasoning model: it refuses three fields that others take."""
    for field in ("max_tokens", "temperature", "seed"):
        if field in body:
            return 400, {}, json.dumps(REFUSAL).encode()
    assert body["max_completion_tokens"] == 256
    return reply("Verdict: CORRECT")


def test_a_refusal_is_shown_once_in_the_servers_own_words(ask, caplog):
    client, server = ask(strict_server, concurrency=4)
    found = judges.judge_triples(client, [TRIPLE] * 6, [(7, 0, row, 0) for row in range(6)])
    assert found == [Judgement(None, "", "http_400")] * 6 and len(server.requests) == 6
    (said,) = [r.getMessage() for r in caplog.records if "the server says" in r.getMessage()]
    assert "http_400: the server says: Unsupported parameter: 'max_tokens' is not supported" in said
    assert '--config.judge.fields="max_tokens=max_completion_tokens"' in said
    assert client.server_words["http_400"].endswith("Use 'max_completion_tokens' instead.")


def test_refused_fields_are_renamed_and_dropped(ask):
    client, server = ask(strict_server, fields="max_tokens=max_completion_tokens, temperature=,seed=")
    assert judges.judge_triples(client, [TRIPLE], [IDS]) == [Judgement(True, "Verdict: CORRECT")]
    assert sorted(server.bodies[0]) == ["max_completion_tokens", "messages", "model", "top_p"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("max_tokens", "'max_tokens' has no \"=\": write FIELD=NEW_NAME"),
        ("stop=", "'stop' is none of the fields max_tokens, temperature"),
        ("model=name", "'model' is none of the fields"),
        ("seed=,seed=x", "'seed' is there twice"),
        ("seed=the seed", "'the seed' is no name of a field"),
        ("seed=temperature", "a request would have temperature twice"),
        ("seed=model", "a request would have model twice"),
        ("seed=x,top_p=x", "a request would have x twice"),
    ],
)
def test_changes_of_fields_are_checked(fields, message):
    with pytest.raises(SetupError, match=f"judge.fields={fields!r}: .*{message}"):
        section(url="http://h/v1", model="m", fields=fields)
    with pytest.raises(SetupError, match="judge.fields='seed=' has no effect with judge.kind=local"):
        section(kind="local", fields="seed=")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "no\\nsuch \\u001b[31m field", "param": "seed"}}', "no such [31m field"),
        (b'{"error": "too long"}', "too long"),
        (b'{"object": "error", "message": "extra fields not permitted"}', "extra fields not permitted"),
        (
            b'{"detail": [{"loc": ["body", "seed"], "msg": "extra"}]}',
            '[{"loc": ["body", "seed"], "msg": "extra"}]',
        ),
        (b'{"error": {"message": "wrong key sk-secret"}}', "wrong key ***"),
        (b"<html>Bad Gateway</html>", "<html>Bad Gateway</html>"),
        (b"[" * 100_000, "[" * 400 + "..."),
        (b"\xff", "\ufffd"),
        (b"", ""),
        (b"{}", "{}"),
    ],
)
def test_the_words_of_a_refusal_are_found(body, words):
    assert chat_replies.describe_refusal(body, "sk-secret") == words


def make_body(message: dict, **rest) -> bytes:
    return json.dumps({"choices": [{"message": message} | rest.pop("choice", {})]} | rest).encode()


PARTS = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Verdict: "}, "CORRECT"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (make_body({"content": "a"}), Completion("a")),  # neither finish_reason nor usage
        (make_body({"content": "a"}, usage=None, choice={"finish_reason": None}), Completion("a")),
        (make_body({"content": "a"}, usage={}), Completion("a")),
        (make_body({"content": "a"}, usage={"completion_tokens": None}), Completion("a")),
        (make_body({"content": "a"}, usage={"completion_tokens": 9}), Completion("a", False, 9)),
        (make_body({"content": "a"}, usage={"completion_tokens": 10}), Completion("a", True, 10)),
        (make_body({"content": "a"}, usage={"completion_tokens": 10}, choice={"finish_reason": "stop"}),
         Completion("a", False, 10)),
        (make_body({"content": "a"}, usage={"completion_tokens": "9"}), Failure("nonsense")),
        (make_body({"content": "a"}, usage=[1]), Failure("nonsense")),
        (make_body({"content": PARTS}), Completion("Verdict: CORRECT")),
        (make_body({"content": [{"type": "image_url", "image_url": {}}]}), Failure("empty")),
        (make_body({"content": []}), Failure("empty")),
        (make_body({"content": [5]}), Failure("nonsense")),
        (make_body({"content": [{"type": "text"}]}), Failure("nonsense")),
        (make_body({"content": {"text": "a"}}), Failure("nonsense")),
        (make_body({"reasoning_content": "hm"}, choice={"finish_reason": "length"}), Failure("empty")),
        (b'{"error": {"message": "overloaded"}}', Failure("nonsense")),
    ],
)  # fmt: skip
def test_replies_of_servers_that_differ_are_read(body, found):
    """The limit of the request is 10 tokens."""
    assert chat_replies.parse_server_reply(body, 10) == found


def test_an_error_in_a_reply_of_status_200_is_shown(ask, caplog):
    client, _ = ask(lambda n, body: (200, {}, b'{"error": {"message": "overloaded"}}'))
    assert client.ask([[("user", "hello")]], [IDS]) == [Failure("nonsense")]
    assert "nonsense: the server says: overloaded" in caplog.text
