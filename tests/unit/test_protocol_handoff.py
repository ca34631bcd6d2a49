# SPDX-License-Identifier: Apache-2.0
"""The handoff as it travels between prefill and decode."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_protocol import handoff
from tandem_protocol.errors import RequestError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON))
def test_the_connectors_own_fields_survive(fields: dict[str, Any]) -> None:
    """Whatever a connector puts in arrives unchanged, since its fields may change with every vLLM release."""
    params = {**fields, "do_remote_prefill": True}
    assert handoff.decode(handoff.encode(params)) == params


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"not json"])
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    """The client is told to pass the prefill model's output on."""
    with pytest.raises(RequestError, match="is not JSON"):
        handoff.decode(raw)


@pytest.mark.parametrize("raw", [
    b"null", b"[]", b"{}", b'{"do_remote_prefill": false}', b'{"do_remote_prefill": 1}', b'"do_remote_prefill"',
    handoff.encode(handoff.PREFILL_REQUEST),
])
def test_what_is_no_prefill_answer_is_refused(raw: bytes) -> None:
    """Also a prefill request, which asks for the other leg."""
    with pytest.raises(RequestError, match="is not a prefill answer"):
        handoff.decode(raw)


def test_decode_takes_the_images_that_prefill_saw() -> None:
    """In order; a handoff that says nothing of images is from a prefill worker that had none, or an older one."""
    params = {"do_remote_prefill": True, handoff.IMAGE_IDS: ["a", "b"]}
    handoff.check_images(params, ("a", "b"))
    handoff.check_images({"do_remote_prefill": True}, ("a",))
    for others in ((), ("a",), ("b", "a"), ("a", "c")):
        with pytest.raises(RequestError, match="a URL changed"):
            handoff.check_images(params, others)
