"""`Placement`: which party has which segment, written out."""

import pytest

from split_lightning.placement import CLIENT, SERVER, PartyType, Placement, client_of

FIRST, SECOND = PartyType("client", 0), PartyType("client", 1)
# The layouts, further arguments; for clients 0 and 2 of three: their parties.
CASES = {
    "one cut": ([(CLIENT, SERVER)], {}, ["client/0 server/0", "client/2 server/0"]),
    "U": (
        [(CLIENT, SERVER, CLIENT)],
        {},
        ["client/0 server/0 client/0", "client/2 server/0 client/2"],
    ),
    "hops": (
        [(CLIENT, SERVER, PartyType("server", 1))],
        {},
        ["client/0 server/0 server/1", "client/2 server/0 server/1"],
    ),
    "hops in groups": (
        [(CLIENT, SERVER, PartyType("server", 1))],
        {"num_groups": 2},
        ["client/0 server/0 server/1", "client/2 server/2 server/3"],
    ),
    "a server each": (
        [(CLIENT, SERVER)],
        {"num_groups": None},
        ["client/0 server/0", "client/2 server/2"],
    ),
    "holders": (
        [(FIRST, SECOND, SERVER)],
        {},
        ["client/0.0 client/0.1 server/0", "client/2.0 client/2.1 server/0"],
    ),
    "cuts": (
        [(CLIENT, SERVER, SERVER), (CLIENT, CLIENT, SERVER)],
        {"entries": [1, 0]},
        ["client/0 client/0 server/0", "client/2 server/0 server/0"],
    ),
    "networks of their own": (
        [(CLIENT, None, SERVER), (None, CLIENT, SERVER)],
        {"entries": [0, 1]},
        ["client/0 - server/0", "- client/2 server/0"],
    ),
    "one party": ([(SERVER,)], {}, ["server/0", "server/0"]),
}


@pytest.mark.parametrize(("layouts", "options", "expected"), CASES.values(), ids=CASES)
def test_each_client_has_its_parties(layouts, options, expected):
    options = {"entries": (0,), "num_clients": 3, "num_groups": 1} | options
    placement = Placement(layouts, **options)
    found = [" ".join(name or "-" for name in placement.of(k)) for k in (0, 2)]
    assert found == expected
    assert placement.differ == (len(layouts) > 1)
    counts = options["num_clients"], options["num_groups"]
    again = Placement(layouts, options["entries"], len(options["entries"]))
    assert again.with_clients(*counts).of(2) == placement.of(2)


def test_entries_are_dealt_out_to_neighbours():
    placement = Placement([(CLIENT,), (SERVER,)], [0, 1, 0], num_clients=7)
    assert [placement.layout_number(k) for k in range(7)] == [0, 0, 0, 1, 1, 0, 0]
    assert placement.roles_of(0) == ("client", "server")


@pytest.mark.parametrize(
    ("layout", "member", "party"),
    [
        ((CLIENT, SERVER), 0, "client/2"),
        ((FIRST, SECOND, SERVER), 1, "client/2.1"),
        ((SERVER,), 0, "server/0"),
    ],
)
def test_labels_are_a_clients_or_else_of_who_has_all(layout, member, party):
    placement = Placement([layout], num_clients=3, label_member=member)
    assert placement.label_party(2) == party
    assert client_of("client/2.1") == client_of("client/2") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"entries": [0, 0, 0]},
            r"entry of `cut_layer` for each client.*2\), but got 3",
        ),
        ({"num_groups": 3}, r"`num_servers` to be .* from 1 to .*\(2\).* but got 3"),
        ({"num_groups": 0}, "`num_servers`.*but got 0"),
    ],
)
def test_more_than_there_are_clients_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Placement([(CLIENT, SERVER)], **{"num_clients": 2} | options)
