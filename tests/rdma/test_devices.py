"""The guest has what the other tests count on."""

from __future__ import annotations

from kvrdma.transports.verbs.pyverbs_binding import load_pyverbs


def test_pyverbs_opens_two_devices() -> None:
    load_pyverbs()
    from pyverbs.device import Context

    for number in range(2):
        with Context(name=f"rxe{number}") as context:
            assert context.query_port(1).state == 4  # ACTIVE
            assert str(context.query_gid(1, 1).gid).endswith(f"ffff:0a00:000{number + 1}")
