"""The service's settings, addresses, clients and rates: what is read, and what is refused."""

import hashlib
from pathlib import Path

import pytest
import yaml

from batchpilot.__main__ import main
from batchpilot.agents.parameters import ConfigError
from batchpilot.service.access import (
    AccessList,
    Caller,
    Role,
    Scope,
    certificate_names,
    certificate_scope,
    read_access,
)
from batchpilot.service.addresses import Address
from batchpilot.service.policy_source import PolicySource
from batchpilot.service.rates import ClientRates, TokenBucket
from batchpilot.service.settings import (
    SECTIONS,
    GroupSettings,
    ServiceSettings,
    load_yaml,
    parse_settings,
    read_settings,
)
from batchpilot.service.wire import EngineKey


def test_without_a_file_every_setting_has_its_default():
    settings = read_settings(None)
    assert settings.server.bind == "127.0.0.1:50061"
    assert settings.default.policy == "predictive"  # does with targets and without
    assert settings.groups == {}


def test_a_group_has_the_keys_of_default_unless_it_sets_its_own(tmp_path):
    path = tmp_path / "service.yaml"
    path.write_text(
        "default: {policy: memory, itl_slo_ms: 50}\n"
        "groups:\n"
        "  chat: {policy: memory-peak}\n"
        "  code: {itl_slo_ms: 20, lease_ms: 4000}\n"
    )
    groups = read_settings(path).groups
    assert (groups["chat"].policy, groups["chat"].itl_slo_ms) == ("memory-peak", 50.0)
    assert (groups["code"].policy, groups["code"].itl_slo_ms) == ("memory", 20.0)
    assert (groups["code"].lease_ms, groups["chat"].lease_ms) == (4000, 2000)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sever: {}", "unknown section 'sever'; allowed: server, limits, tls"),
        ("server: {}\n1: {}\nnull: {}", "unknown section 1; allowed: server, limits"),
        ("server: {1: x, binds: x, null: x}", "server: unknown key 1; allowed: bind,"),
        ("server: {binds: x}", "server: unknown key 'binds'; allowed: bind,"),
        ("server: {drain_seconds: fast}", "drain_seconds='fast' is not a finite number"),
        ("limits: {max_sessions: 0}", "max_sessions=0 must be at least 1"),
        ("groups: {chat: {lease_ms: 300}}", "groups: chat: lease_ms=300 must be at least twice"),
        ("groups: {chat: {max_num_seqs: 2, min_num_seqs: 3}}", "max_num_seqs=2 must be at least"),
        ("canary: {share: 0.5}", "canary: share is given with each promotion, not here"),
        ("canary: true", "canary: True is not a mapping"),
        ("canary: false", "canary: False is not a mapping"),
        ("canary: share", "canary: 'share' is not a mapping"),
        ("groups: {chat: 0}", "groups: chat: 0 is not a mapping"),
        ("canary: {confidence: 2}", "confidence=2.0 must be less than 1"),
        ("groups: [chat]", r"groups: \['chat'\] is not a mapping"),
        ("- 1", "is not a mapping"),
        (
            "storage: {state: 2026-13-45}",
            r"not YAML \('2026-13-45' is no timestamp \(month must be in 1..12\); "
            "put text in quotes, line 1, column 18",
        ),
        ("? 2026-13-45\n: {}", "'2026-13-45' is no timestamp"),
        ("storage: {state: !!int x}", "'x' is no int"),
        ("storage: {state: !!bool x}", "'x' is no bool"),
        ("storage: {state: !!timestamp x}", "'x' is no timestamp"),
        (f"limits: {{max_sessions: {'9' * 400}}}", "9 is not a whole number"),
        ("server: {", "not YAML"),
        ("a: b\nserver: [", "line 2, column 10"),
        ("[" * 5000, "nested too deeply"),
        ("server: !!python/object/apply:os.system [id]", "not YAML"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_says_where(tmp_path, text, complaint):
    path = tmp_path / "service.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as refused:
        read_settings(path)
    assert str(path) in str(refused.value)


def test_an_error_quotes_no_line_of_the_file(tmp_path):
    path = tmp_path / "access.yaml"
    path.write_text("token: very-secret: {")
    with pytest.raises(ConfigError, match="not YAML") as refused:
        load_yaml(path)
    assert "very-secret" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read \(No such file"):
        read_settings(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "host", "loopback"),
    [
        ("127.0.0.1:1", "127.0.0.1", True),
        ("127.8.9.10:1", "127.8.9.10", True),
        ("[::1]:1", "::1", True),
        ("localhost:1", "localhost", True),
        ("0.0.0.0:1", "0.0.0.0", False),
        ("[::]:1", "::", False),
        ("10.0.0.1:1", "10.0.0.1", False),
        ("localhost.example.org:1", "localhost.example.org", False),
    ],
)
def test_which_addresses_only_this_machine_can_reach(text, host, loopback):
    address = Address.parse(text, where="bind")
    assert (address, address.is_loopback, str(address)) == ((host, 1), loopback, text)


@pytest.mark.parametrize("text", ["", "1", "host", ":1", "host:", "host:65536", "::1:5", "h:-1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        Address.parse(text, where="bind")


def write(path, clients, mode=0o600):
    path.write_text(yaml.safe_dump({"clients": clients}))
    path.chmod(mode)
    return path


TOKEN = "a-token-of-some-length"
DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()


def test_clients_are_known_by_token_by_its_hash_or_by_certificate(tmp_path):
    other = "another-token-of-some-length"
    access = read_access(
        write(
            tmp_path / "access.yaml",
            [
                {"name": "fleet", "role": "engine", "token_sha256": DIGEST, "groups": ["chat"]},
                {"name": "ops", "role": "admin", "token": other},
                {"name": "grafana", "role": "viewer", "certificate": "grafana.example"},
            ],
        )
    )
    fleet, ops, grafana = access.clients
    assert access.by_token(TOKEN) == fleet
    assert access.by_token(other) == ops
    assert access.by_token("a-token-of-some-lengtH") is None
    assert access.by_token("") is None
    assert access.by_certificate(("x", "grafana.example")) == grafana
    assert access.by_certificate(()) is None
    assert (fleet.role, fleet.scope) == (Role.ENGINE, Scope(groups=("chat",)))


def test_a_client_known_by_certificate_has_no_token_that_could_be_guessed(tmp_path):
    entry = {"name": "grafana", "role": "viewer", "certificate": "grafana.example"}
    access = read_access(write(tmp_path / "access.yaml", [entry]))
    assert access.by_token("") is None
    assert access.by_token("\0" * 32) is None


@pytest.mark.parametrize(
    ("mode", "secret", "fits"),
    [
        (0o600, True, True),
        (0o640, True, False),
        (0o604, True, False),
        (0o644, False, True),
        (0o664, False, False),
        (0o646, False, False),
    ],
)
def test_a_file_of_clients_that_others_may_change_or_tokens_they_may_read_is_refused(
    tmp_path, mode, secret, fits
):
    entry = {"name": "a", "role": "viewer"}
    entry |= {"token": TOKEN} if secret else {"token_sha256": DIGEST}
    path = write(tmp_path / "access.yaml", [entry], mode)
    if fits:
        assert len(read_access(path).clients) == 1
        return
    with pytest.raises(ConfigError, match="chmod 600"):
        read_access(path)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"role": "viewer", "token": TOKEN}, "name is required"),
        ({"name": "a", "role": "root", "token": TOKEN}, "role='root' is not one of"),
        ({"name": "a", "role": "viewer"}, "exactly one of token"),
        ({"name": "a", "role": "viewer", "token": TOKEN, "certificate": "c"}, "exactly one of"),
        ({"name": "a", "role": "viewer", "token": "short"}, "at least 16 characters"),
        ({"name": "a", "role": "viewer", "token_sha256": "ab"}, "not 64 hexadecimal digits"),
        ({"name": "a", "role": "viewer", "token": TOKEN, "groups": ["x"]}, "role engine only"),
        ({"name": "a", "role": "engine", "token": TOKEN, "groups": "x"}, "not a list of patterns"),
        ({"name": "a", "role": "engine", "token": TOKEN, "engines": []}, "not a list of patterns"),
    ],
)
def test_a_client_that_does_not_fit_is_refused(tmp_path, entry, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read_access(write(tmp_path / "access.yaml", [entry]))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1: x\nclient: []\nnull: x", "access.yaml: unknown key 1; allowed: clients"),
        ("clients: [{1: x, nam: x, null: x}]", "client 1: unknown key 1; allowed: name, role"),
        ("clients: [{name: 2026-13-45}]", "'2026-13-45' is no timestamp .* put text in quotes"),
        ("clients: true", "clients is not a list"),
        ("clients: [x]", "client 1: 'x' is not a mapping"),
    ],
)
def test_a_file_of_clients_that_does_not_fit_is_refused(tmp_path, text, complaint):
    path = tmp_path / "access.yaml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=complaint):
        read_access(path)


@pytest.mark.parametrize(
    "text", ["", "# clients: []\n", "{}", "clients:", "clients:\n# - {name: a}"]
)
def test_a_file_of_clients_that_has_become_empty_is_refused(tmp_path, text):
    path = tmp_path / "access.yaml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(
        ConfigError, match=r"access.yaml: empty; for no clients, say so: clients: \["
    ):
        read_access(path)


def test_no_clients_are_asked_for_by_an_empty_list(tmp_path):
    assert read_access(write(tmp_path / "access.yaml", [])) == AccessList()


def test_a_section_or_a_group_may_be_left_empty():
    content = {"server": None, "canary": None, "groups": {"chat": None}}
    settings = parse_settings(content, where="test")
    assert settings.server == read_settings(None).server
    assert settings.groups == {"chat": settings.default}


def test_a_client_may_not_be_there_twice(tmp_path):
    entry = {"name": "a", "role": "viewer", "token_sha256": DIGEST}
    with pytest.raises(ConfigError, match="client 'a' is there twice"):
        read_access(write(tmp_path / "access.yaml", [entry, entry]))


def key(engine, group="chat"):
    return EngineKey(group, engine, 0)


def test_an_engine_must_be_in_all_scopes_of_its_caller():
    scopes = (Scope(("chat", "code-*"), ("node-?",)), certificate_scope(("node-1",)))
    caller = Caller("fleet", Role.ENGINE, scopes)
    assert caller.may_speak_for(key("node-1"))
    assert caller.may_speak_for(key("node-1", "code-7b"))
    assert not caller.may_speak_for(key("node-2"))
    assert not caller.may_speak_for(key("node-1", "other"))
    assert Caller("anyone", Role.ADMIN).may_speak_for(key("whoever"))


def test_a_name_in_a_certificate_is_no_pattern():
    scope = certificate_scope(("*", "node-[1]", "a?"))
    assert scope.allows(key("*"))
    assert scope.allows(key("node-[1]:5"))
    for engine in ("node-1", "ab", "anything", "*x"):
        assert not scope.allows(key(engine))
    assert not certificate_scope(()).allows(key("node-1"))


def test_every_name_of_a_certificate_counts_once():
    context = {"x509_common_name": [b"a"], "x509_subject_alternative_name": [b"a", b"b"]}
    assert certificate_names(context) == ("a", "b")
    assert certificate_names({"transport_security_type": [b"insecure"]}) == ()
    assert AccessList().by_certificate(("a",)) is None


def test_a_bucket_lets_through_its_burst_and_then_its_rate():
    bucket = TokenBucket(per_second=2.0, burst=3.0, now=10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(10.5), bucket.take(10.5)] == [True, False]
    assert not bucket.take(11.0, cost=2.0)
    assert bucket.take(11.5, cost=2.0)
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_clients_have_buckets_of_their_own_and_only_so_many_are_remembered():
    now = [0.0]
    rates = ClientRates(per_second=0.0, burst=1.0, most=2, clock=lambda: now[0])
    assert [rates.take("a"), rates.take("a"), rates.take("b")] == [True, False, True]
    assert rates.take("c")  # forgets a, which was seen longest ago
    assert [rates.take("b"), rates.take("a")] == [False, True]


def test_the_example_file_can_be_used_as_it_is():
    path = Path(__file__).parents[1] / "service" / "example.yaml"
    settings = read_settings(path)
    PolicySource().check_groups(settings)
    assert settings.groups["chat"].policy == "memory+sla"
    assert settings.groups["batch"].lease_ms == settings.default.lease_ms == 2000


def test_the_printed_file_is_every_default_with_and_without_its_signs(tmp_path, capsys):
    assert main(["serve", "--print-settings"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "service.yaml"
    path.write_text(printed)
    assert read_settings(path) == ServiceSettings()
    every_key = printed.replace("\n  # ", "\n  ")
    path.write_text(every_key)
    groups = {"chat": GroupSettings(policy="memory+sla", itl_slo_ms=50.0)}
    assert read_settings(path) == ServiceSettings(groups=groups)
    keys = {line.strip().partition(":")[0] for line in every_key.splitlines()}
    assert {name for kind in SECTIONS.values() for name in kind.names()} - keys == {"share"}
    assert set(GroupSettings.names()) <= keys


def test_the_printed_file_says_nothing_of_other_options(capsys):
    assert main(["serve", "--print-settings", "--policy", "memory"]) == 2
    assert "--print-settings goes alone" in capsys.readouterr().err


def test_a_bad_policy_is_the_options_where_it_was_given_there(tmp_path, capsys):
    path = tmp_path / "service.yaml"
    path.write_text("default: {policy: memory}")
    assert main(["serve", "--config", str(path), "--policy", "clever"]) == 2
    assert "serve: --policy: unknown policy 'clever'" in capsys.readouterr().err


def test_every_setting_explains_itself():
    settings = parse_settings({}, where="test")
    for section in (settings.server, settings.limits, settings.tls, settings.access):
        for item in section.__dataclass_fields__.values():
            assert len(item.metadata["help"]) > 10
