"""Tokens: the file, who is found by a secret, and what a caller may ask for."""

from __future__ import annotations

import hashlib
import logging
import tomllib
from pathlib import Path

import pytest

from camserve.errors import InvalidOption, Overloaded
from camserve.gateway.api.access import ANYONE, Caller, Rates, caller, identify, new_token, parse_tokens, token_file
from camserve.planning import Owner

FILE = Path("tokens.toml")
HASH = hashlib.sha256(b"secret").hexdigest()


def parsed(text: str):
    return parse_tokens(FILE, text.encode())


def test_a_new_token_is_found_by_its_secret_and_the_entry_does_not_hold_it():
    secret, entry = new_token("radiology", priority="batch", requests_per_s=2.5, max_requests=None)
    other, _ = new_token("radiology")
    assert secret != other
    assert len(secret) >= 43, "256 bits in base64"
    assert secret not in entry
    assert tomllib.loads(entry)["tokens"]["radiology"]["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    found = identify(parsed(entry), secret)
    assert found == Caller("radiology", "batch", requests_per_s=2.5, burst=3)
    assert identify(parsed(entry), other) is None


def test_every_token_of_a_file_is_found_and_nothing_else():
    entries = {name: new_token(name) for name in ("one", "two", "three")}
    tokens = parsed("\n".join(entry for _, entry in entries.values()))
    assert [identify(tokens, secret).name for secret, _ in entries.values()] == list(entries)
    for wrong in ("", "camserve_", entries["one"][0][:-1], entries["one"][0] + "x", tokens[0].digest.hex()):
        assert identify(tokens, wrong) is None


def test_all_tokens_are_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch):
    secret, first = new_token("first")
    tokens = parsed(first + new_token("second")[1])
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda left, right: compared.append(left) or left == right)
    assert identify(tokens, secret).name == "first"
    assert len(compared) == 2


def test_an_entry_may_have_every_bound():
    text = f"""[tokens.a-B_1]
sha256 = "{HASH}"
priority = "normal"
requests_per_s = 10
burst = 20
max_requests = 4
max_waiting_s = 40.5
"""
    (token,) = parsed(text)
    assert token.caller == Caller("a-B_1", "normal", 10, 20, 4, 40.5)
    assert token.caller.owner == Owner("a-B_1", 4, 40.5)


def test_one_token_of_several_has_half_of_the_server_at_most():
    other = HASH[:-1] + "0"
    (alone,) = parsed(f'[tokens.ann]\nsha256 = "{HASH}"')
    several = parsed(f'[tokens.ann]\nsha256 = "{HASH}"\n[tokens.bob]\nmax_requests = 100\nsha256 = "{other}"')
    assert alone.caller.owner == Owner("ann")
    assert [token.caller.owner for token in several] == [Owner("ann", part=0.5), Owner("bob", requests=100, part=0.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there must be tables"),
        ("[token.a]", "there must be tables"),
        ("tokens = 3", "there must be tables"),
        ("[tokens", "tokens in tokens.toml: "),
        ("tokens = " + 5000 * "[", "tokens in tokens.toml: "),
        ("tokens = " + 5000 * "1", "tokens in tokens.toml: "),
        ("[tokens.a]", "a: sha256 is missing: 64 hexadecimal digits"),
        ("tokens.a = 1", "a: it must be a table"),
        ('[tokens.a]\nsha256 = "swordfish"', "a: sha256 must be 64 hexadecimal digits .* got 9 characters"),
        (f'[tokens.a]\nsha256 = "{HASH.upper()}"', "in lower case"),
        (f'[tokens."a b"]\nsha256 = "{HASH}"', "letters, digits, '_' and '-', got 'a b'"),
        (f'[tokens.a]\nsha256 = "{HASH}"\nrate = 3', "a: unknown 'rate'; there are sha256, priority"),
        (f'[tokens.a]\nsha256 = "{HASH}"\npriority = "urgent"', "priority must be interactive, normal or batch"),
        (f'[tokens.a]\nsha256 = "{HASH}"\nmax_requests = 0', "max_requests must be a whole number from 1.*got 0"),
        (f'[tokens.a]\nsha256 = "{HASH}"\nmax_requests = "3"', "max_requests must be a whole number"),
        (f'[tokens.a]\nsha256 = "{HASH}"\nrequests_per_s = inf', "requests_per_s must be a number above 0"),
        (f'[tokens.a]\nsha256 = "{HASH}"\n[tokens.b]\nsha256 = "{HASH}"', "two of them have the same sha256"),
    ],
)
def test_a_bad_file_is_refused_with_what_is_allowed(text: str, message: str):
    with pytest.raises(InvalidOption, match=message) as caught:
        parsed(text)
    assert "swordfish" not in str(caught.value), "somebody may have put the secret there"


def test_a_file_may_let_in_nobody_if_it_says_so():
    assert parsed("[tokens]") == ()
    assert identify((), "secret") is None


@pytest.mark.parametrize("name", ["", "a b", "ä", "a" * 65, "a.b", "a\n"])
def test_a_new_token_has_a_plain_name(name: str):
    with pytest.raises(InvalidOption, match=r"1\.\.64 letters"):
        new_token(name)


def test_a_new_token_has_sound_bounds():
    with pytest.raises(InvalidOption, match=r"^a: burst must be a whole number from 1.*got 0"):
        new_token("a", burst=0)


def test_the_file_is_read_again_and_bad_content_keeps_the_old(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "tokens.toml"
    (one, first), (two, second) = new_token("one"), new_token("two")
    path.write_text(first)
    tokens = token_file(path, every_s=0)
    assert identify(tokens.get(), one).name == "one"
    path.write_text(second)
    assert identify(tokens.get(), one) is None
    assert identify(tokens.get(), two).name == "two"
    caplog.clear()
    for broken in ("[tokens.x", None):
        path.unlink() if broken is None else path.write_text(broken)
        for _ in range(3):
            assert identify(tokens.get(), two).name == "two"
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2, "each problem is logged once"
    assert all("the old ones stay in use" in error for error in errors)
    path.write_text(first)
    assert identify(tokens.get(), one).name == "one"


def test_the_file_is_looked_at_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tokens.toml"
    path.write_text(new_token("one")[1])
    tokens, now_s = token_file(path, every_s=5), 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    assert tokens.get()[0].caller.name == "one"
    path.write_text(new_token("two")[1])
    now_s = 104.0
    assert tokens.get()[0].caller.name == "one"
    now_s = 105.0
    assert tokens.get()[0].caller.name == "two"


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path):
    with pytest.raises(InvalidOption, match=r"tokens: cannot read .*none\.toml: No such file"):
        token_file(tmp_path / "none.toml")


def test_nobody_is_named_where_tokens_are_off():
    assert caller() is ANYONE
    assert (ANYONE.name, ANYONE.owner) == ("", Owner())


@pytest.mark.parametrize(
    ("best", "asked", "given"),
    [
        ("interactive", "interactive", "interactive"),
        ("normal", "interactive", "normal"),
        ("normal", "batch", "batch"),
        ("batch", "interactive", "batch"),
    ],
)
def test_a_class_is_capped_by_the_token(best, asked, given):
    assert Caller("a", best).capped(asked) == given


def test_a_caller_has_its_burst_and_then_its_rate():
    rates, ann = Rates(), Caller("ann", requests_per_s=2, burst=3)
    for _ in range(3):
        rates.check(ann, 10.0)
    with pytest.raises(Overloaded, match="at most 2 requests per second of ann, 3 at once") as refusal:
        rates.check(ann, 10.25)
    assert refusal.value.retry_after_s == pytest.approx(0.25)
    assert refusal.value.reason == "token_rate"
    rates.check(ann, 10.5)
    with pytest.raises(Overloaded):
        rates.check(ann, 10.5)
    for _ in range(3):  # a long pause fills the bucket, and no more
        rates.check(ann, 1000.0)
    with pytest.raises(Overloaded):
        rates.check(ann, 1000.0)


def test_callers_do_not_share_a_rate_and_some_have_none():
    rates = Rates()
    rates.check(Caller("ann", requests_per_s=0.001), 0.0)
    rates.check(Caller("bob", requests_per_s=0.001), 0.0)
    for _ in range(1000):
        rates.check(ANYONE, 0.0)
        rates.check(Caller("eve"), 0.0)


def test_a_rate_that_was_raised_in_the_file_holds_at_once():
    rates = Rates()
    rates.check(Caller("ann", requests_per_s=0.01), 0.0)
    rates.check(Caller("ann", requests_per_s=10.0), 0.1)
